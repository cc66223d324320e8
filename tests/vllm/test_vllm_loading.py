"""A push that writes vLLM's parameters in place, as on a GPU, gives the bits of vLLM's own reload: real vLLM, made not to pack."""

import ast
import inspect
import textwrap
from functools import partial

import pytest
import torch
import transformers
from making import generate
from test_vllm_engine import EOS, LETTERS, PARAMS, logprobs, make_tokenizer, perturb, prompts, samples_of, seeds

from pgrpo.config import Config, DataConfig, ModelConfig, RolloutConfig
from pgrpo.distributed.world import start
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.weights import full_weights, weight_names
from pgrpo.rollout.vllm import loading
from pgrpo.rollout.vllm.delivery import DeliveryError
from pgrpo.rollout.vllm.engine import VLLMEngine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
PACKED = "model.layers.0.self_attn.qkv_proj.weight"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the engine's contract tests load in place there")
def test_loading_in_place_gives_the_bits_of_a_reload(tmp_path, monkeypatch):
    from vllm.model_executor.layers import utils  # pyright: ignore[reportMissingImports]

    def not_packed(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", not_packed)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(LETTERS) + 2, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.1, eos_token_id=EOS, pad_token_id=0, bos_token_id=None,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer = make_tokenizer(tmp_path)
    settings = Config(
        model=ModelConfig(path=str(tmp_path), dtype="float32"),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(max_completion_tokens=16, enforce_eager=True, max_concurrent=32),
    )
    with start() as world:
        policy = Policy(load_model(settings.model, torch.float32))
        weights, names = partial(full_weights, policy.model, torch.float32), weight_names(policy.model)
        engine = VLLMEngine(settings, world, tokenizer, [EOS], weights, names, memory_share=0.2)
        try:
            monkeypatch.setattr(engine, "on_gpu", True)  # what this vLLM did not pack need not be packed again
            model, reloads = engine._model(), []
            own = engine.llm.collective_rpc
            monkeypatch.setattr(engine.llm, "collective_rpc", lambda what, **k: reloads.append(what) or own(what, **k))
            assert model.get_parameter(PACKED).numel() and loading.loads_in_place(model)
            for step in range(2):
                perturb(policy, 0.05)
                with engine.awake(step):
                    samples = samples_of(generate(engine, prompts("abc", "0123"), PARAMS, seeds(2, 8, step)))
                rollout = [x for s in samples for x in s.rollout_logprobs]
                assert rollout == pytest.approx(logprobs(policy, samples), abs=1e-3)
            assert "reload_weights" not in reloads
            in_place = [x.clone() for x in (*model.parameters(), *model.buffers())]
            with monkeypatch.context() as patch:
                patch.setattr(loading, "loads_in_place", lambda model: False)
                engine.push()
            assert "reload_weights" in reloads
            assert all(map(torch.equal, in_place, (*model.parameters(), *model.buffers())))
            load = type(model).load_weights
            for name, fused in {
                "k_proj.weight": "qkv_proj",
                "up_proj.weight": "gate_up_proj",
                "norm.weight": "norm",
            }.items():
                perturb(policy, 0.05)
                with monkeypatch.context() as patch:  # a tensor that vLLM says it wrote is an old one
                    old = {n: t.clone() for n, t in weights() if n.endswith(name)}
                    perturb(policy, 0.05)
                    lossy = lambda self, new, old=old: load(self, ((n, old.get(n, t)) for n, t in new))  # noqa: E731
                    patch.setattr(type(model), "load_weights", lossy)
                    with pytest.raises(DeliveryError, match=rf"checksums of model\S+{fused}"):
                        engine.push()
        finally:
            monkeypatch.setattr(engine, "on_gpu", False)
            engine.close()


def test_what_is_loaded_in_place_is_processed_on_no_gpu():
    """The methods in PLAIN do nothing after loading but on other devices."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod  # pyright: ignore[reportMissingImports]

    methods = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
    assert tuple(method.__name__ for method in methods) == loading.PLAIN
    for method in methods:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(method.process_weights_after_loading))).body
        assert isinstance(function, ast.FunctionDef)
        (branch,) = function.body
        while branch:
            assert isinstance(branch, ast.If), ast.unparse(branch)
            assert ast.unparse(branch.test) in ("current_platform.is_cpu()", "current_platform.is_xpu()")
            (branch,) = branch.orelse or (None,)
