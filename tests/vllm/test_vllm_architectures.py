"""vLLM samples what the trainer computes, on tiny random models with windows, sinks, experts, states; what is lost is noticed."""

import re
from functools import partial

import pytest
import torch
import transformers
from making import generate
from test_vllm_engine import EOS, LETTERS, logprobs, make_tokenizer, perturb, prompts, seeds, tolerance
from test_vllm_images import make_model

from pgrpo.admission.models import check_model
from pgrpo.config import Config, ConfigError, DataConfig, ModelConfig, RolloutConfig
from pgrpo.distributed.world import start
from pgrpo.model.lora import add_adapters
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.weights import full_weights, weight_names
from pgrpo.rollout.vllm import loading
from pgrpo.rollout.vllm.builds import what_is_built
from pgrpo.rollout.vllm.delivery import DeliveryError
from pgrpo.rollout.vllm.engine import VLLMEngine
from pgrpo.rollout.vllm.start import package, release
from pgrpo.training.vision import engine_images
from pgrpo.types import Prompt, SamplingParams
from pgrpo.vision.families import never_sampled

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
SIZES = {
    "vocab_size": len(LETTERS) + 2, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "max_position_embeddings": 128,
    "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None, "sliding_window": 8,
}  # fmt: skip
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "layerdrop")
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1,
}  # fmt: skip
MODELS = {
    "mistral": {"tie_word_embeddings": False},
    "gemma3_text": {**ALTERNATING, "tie_word_embeddings": True, "query_pre_attn_scalar": 64},
    "gpt_oss": {
        **ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "gemma2": {**ALTERNATING, "tie_word_embeddings": True, "query_pre_attn_scalar": 64},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "biogpt": {"scale_embedding": True, "tie_word_embeddings": True, **dict.fromkeys(DROPOUTS, 0.0)},
    "solar_open": {**ROUTED, "tie_word_embeddings": False},
    "deepseek_v3": {
        **ROUTED, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "qk_rope_head_dim": 64, "num_key_value_heads": 4, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "tie_word_embeddings": False,
    },
    "olmo2": {"tie_word_embeddings": False},
    "qwen3": {"attention_bias": True, "tie_word_embeddings": False},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "tie_word_embeddings": False},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "tie_word_embeddings": True},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
WITHOUT = {
    "biogpt": ("head_dim", "num_key_value_heads", "sliding_window"), "deepseek_v3": ("head_dim", "sliding_window"),
    "granitemoe": ("head_dim", "sliding_window"),
    "olmo2": ("sliding_window",), "solar_open": ("sliding_window",), "starcoder2": ("head_dim",),
}  # fmt: skip
"""What transformers does not read in a config of that type, and vLLM would."""
TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": 4,
}
PUBLISHED = {"qwen3_5": "qwen3_5_text"}
"""Types as they are published: with a vision tower, and a language model of the other type inside."""


@pytest.fixture
def started(request, tmp_path):
    """An engine on a tiny random model of that type (``TYPE``, ``TYPE in bfloat16``, ``... with adapters`` beside its experts),
    asleep, and the policy."""
    name, adapters, _ = request.param.partition(" with adapters")
    kind, _, dtype = name.partition(" in ")
    dtype = dtype or "float32"
    if name == "gpt_oss" and float(release(package().__version__)) < 0.32:
        pytest.skip("this release has sinks on a CPU in bfloat16 only")
    torch.manual_seed(0)
    text = SIZES | MODELS[PUBLISHED.get(kind) or kind]
    if kind in WITHOUT:
        text = {name: value for name, value in text.items() if name not in WITHOUT[kind]}
    if kind in PUBLISHED:
        hf_config = transformers.AutoConfig.for_model(kind, text_config=text, vision_config=TOWER)
        transformers.AutoModelForImageTextToText.from_config(hf_config).save_pretrained(tmp_path)
    else:
        hf_config = transformers.AutoConfig.for_model(kind, **text)
        transformers.AutoModelForCausalLM.from_config(hf_config).save_pretrained(tmp_path)
    tokenizer = make_tokenizer(tmp_path)
    check_model(str(tmp_path), hf_config, max_sample=48)
    config = Config(
        model=ModelConfig(
            path=str(tmp_path), dtype=dtype, lora_rank=4 * bool(adapters), lora_targets=["q_proj", "experts"]
        ),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(max_completion_tokens=16, enforce_eager=True, max_concurrent=32),
    )
    model = load_model(config.model)
    if adapters:
        add_adapters(model, config.model, seed=0)
    policy = Policy(model)
    weights = partial(full_weights, policy.model, getattr(torch, config.model.dtype))
    with start() as world:
        engine = VLLMEngine(config, world, tokenizer, [EOS], weights, weight_names(policy.model), memory_share=0.2)
        yield engine, policy
        engine.close()


ON_A_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="where an engine can sleep there is one in a process")


def sampled(engine, step):
    """Completions of two prompts, and their log-probs as vLLM gave them."""
    with engine.awake(step):
        asked = prompts("some words to begin with", "1+1=")
        groups = generate(engine, asked, SamplingParams(max_completion_tokens=16), seeds(2, 3, step))
    samples = [sample for group in groups for sample in group.samples]
    return samples, [x for sample in samples for x in sample.rollout_logprobs]


@ON_A_CPU
@pytest.mark.parametrize(
    "started",
    [
        "mistral",
        "gemma2",
        "granitemoe",
        "gemma3_text",
        "gpt_oss",
        "qwen3_moe",
        "gpt_oss with adapters",
        "qwen3_moe with adapters",
    ],
    indirect=True,
)
def test_samples_have_the_policys_log_probs_before_and_after_a_push(started):
    engine, policy = started
    for step in range(2):
        samples, reported = sampled(engine, step)
        before = logprobs(policy, samples)
        assert reported == pytest.approx(before, abs=tolerance(policy))
        perturb(policy, 0.02)
        assert logprobs(policy, samples) != pytest.approx(before, abs=10 * tolerance(policy))


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("qwen3", "Qwen3ForCausalLM", "^vLLM has code for Qwen3ForCausalLM$"),
        ("olmo2", "Olmo2ForCausalLM", r"^vLLM has no code for Olmo2ForCausalLM and runs transformers' own \("),
        (
            "jetmoe",
            "JetMoeForCausalLM",
            r"cannot sample from \S+: vLLM has no code for JetMoeForCausalLM and runs .*embedded",
        ),
        (
            "qwen3",
            "NoForCausalLM",
            r"cannot sample from \S+: Model architectures \['NoForCausalLM'\] are not supported for now;",
        ),
    ],
)
def test_vllm_says_before_a_start_what_it_builds(kind, name, said, tmp_path):
    hf_config = transformers.AutoConfig.for_model(kind, architectures=[name])
    hf_config.save_pretrained(tmp_path)
    config = Config(
        model=ModelConfig(path=str(tmp_path), dtype="float32"),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(max_completion_tokens=16),
    )
    if "cannot" in said:
        with pytest.raises(ConfigError, match=said):
            what_is_built(config, hf_config)
    else:
        assert re.search(said, what_is_built(config, hf_config))


@ON_A_CPU
@pytest.mark.parametrize("started", ["deepseek_v3"], indirect=True)
def test_latent_attention_gets_both_halves_of_its_projection(started, monkeypatch):
    """With PyTorch's rotary embeddings: vLLM's for a CPU (0.32) are wrong for the strides that queries have here."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding  # pyright: ignore[reportMissingImports]

    engine, policy = started
    attention = engine._model().model.layers[0].self_attn.mla_attn.mla_attn
    for layer in engine._model().modules():
        if isinstance(layer, RotaryEmbedding):
            monkeypatch.setattr(layer, "_forward_method", layer.forward_native)
    for step in range(2):
        samples, reported = sampled(engine, step)
        assert reported == pytest.approx(logprobs(policy, samples), abs=tolerance(policy))
        perturb(policy, 0.02)
    make, sent = type(attention).process_weights_after_loading, attention.W_UV.clone()

    def with_old_values(self, dtype):
        make(self, dtype)
        if self is attention:
            self.W_UV.data.copy_(sent)

    monkeypatch.setattr(type(attention), "process_weights_after_loading", with_old_values)
    with pytest.raises(DeliveryError, match=r"checksums of .*model\.layers\.0\.\S+\.W_UK_T and W_UV \("):
        engine.push()


@ON_A_CPU
@pytest.mark.parametrize("started", ["olmo2", "starcoder2", "biogpt", "solar_open"], indirect=True)
def test_a_model_that_vllm_builds_of_transformers_classes_is_not_the_policys(started):
    engine, policy = started
    ours, model = type(policy.model.base_model), engine._model()
    assert type(model).__name__ in ("TransformersForCausalLM", "TransformersMoEForCausalLM")
    assert type(model.model).__mro__[1] is ours
    assert not [cls for cls in ours.__mro__ if cls.__module__.startswith("vllm")]
    for step in range(2):
        with engine.awake(step):
            groups = generate(
                engine, prompts("some words to begin with", "1+1="), SamplingParams(16), seeds(2, 3, step)
            )
            samples = [sample for group in groups for sample in group.samples]
            assert engine.score(samples).logprobs == pytest.approx(logprobs(policy, samples), abs=tolerance(policy))
        reported = [x for sample in samples for x in sample.rollout_logprobs]
        before = logprobs(policy, samples)
        assert reported == pytest.approx(before, abs=tolerance(policy))
        perturb(policy, 0.02)
        assert logprobs(policy, samples) != pytest.approx(before, abs=10 * tolerance(policy))
    again = Policy(load_model(ModelConfig(path=policy.model.config.name_or_path, dtype="float32")))
    assert logprobs(again, samples) and type(again.model.base_model) is ours


@ON_A_CPU
@pytest.mark.parametrize(
    "started",
    ["qwen3_5_text in bfloat16", "qwen3_5 in bfloat16", "gpt_oss in bfloat16", "qwen3_moe in bfloat16 with adapters"],
    indirect=True,
)
def test_a_push_arrives_in_bfloat16(started):
    """vLLM's Gated DeltaNet on a CPU computes in bfloat16 only."""
    engine, policy = started
    for step in range(2):
        with engine.awake(step):
            asked = prompts("some words to begin with", "1+1=")
            groups = generate(engine, asked, SamplingParams(max_completion_tokens=16), seeds(2, 8, step))
        samples = [sample for group in groups for sample in group.samples]
        reported = torch.tensor([x for sample in samples for x in sample.rollout_logprobs])
        before = torch.tensor(logprobs(policy, samples))
        perturb(policy, 0.05)
        noise = (reported - before).abs().mean().item()
        change = (torch.tensor(logprobs(policy, samples)) - before).abs().mean().item()
        print(f"engine and policy differ by {noise:.3f} nats on average, the policy changes by {change:.3f}")
        assert noise < 0.05 and change > 5 * noise


@ON_A_CPU
@pytest.mark.parametrize("started", ["gpt_oss in bfloat16"], indirect=True)
def test_what_a_reload_does_not_record_is_noticed(started, monkeypatch):
    """vLLM copies gpt-oss' sinks and experts past the loaders that a reload records."""
    engine, _ = started
    monkeypatch.setattr(loading, "COPIED", {})
    with pytest.raises(DeliveryError, match=r"checksums of model\.layers\.0\.attn\.sinks"), engine.awake(0):
        pass
    monkeypatch.setattr(loading, "COPIED", {"GptOssForCausalLM": ("w13_weight", "w13_bias", "w2_weight")})
    with pytest.raises(DeliveryError, match=r"checksums of \S+experts\.w2_bias"), engine.awake(0):
        pass


@ON_A_CPU
@pytest.mark.parametrize("started", ["qwen3"], indirect=True)
def test_a_weight_that_vllm_ignores_is_refused_by_name(started):
    """vLLM's Qwen3 has the biases of q, k and v, and none of the output projection."""
    engine, policy = started
    perturb(policy, 0.1)
    ignored = ", ".join(rf"model\.layers\.{layer}\.self_attn\.o_proj\.bias" for layer in range(2))
    expected = rf"^weight push: vLLM's model has no place for {ignored} \(2 in all\): it would sample"
    with pytest.raises(DeliveryError, match=expected), engine.awake(0):
        pass


@ON_A_CPU
def test_a_tower_that_vllm_did_not_build_is_no_loss_to_a_run_without_images(tmp_path):
    hf_config = make_model("qwen3_vl", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    config = Config(
        model=ModelConfig(path=str(tmp_path), dtype="float32"),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(max_completion_tokens=16, enforce_eager=True, max_concurrent=32),
    )
    policy = Policy(load_model(config.model))
    names, banned = weight_names(policy.model), never_sampled(hf_config)
    with start() as world:
        engine = VLLMEngine(
            config, world, tokenizer, [hf_config.get_text_config().eos_token_id],
            partial(full_weights, policy.model, torch.float32), names, memory_share=0.2,
            images=engine_images(hf_config, None, []), banned=banned,
        )  # fmt: skip
        try:
            assert any("visual" in name for name in names) and not list(engine._model().visual.children())
            with engine.awake(0):
                groups = generate(engine, [Prompt(0, "", [5, 6, 7])], SamplingParams(16), seeds(1, 8))
        finally:
            engine.close()
    samples = [sample for group in groups for sample in group.samples]
    reported = [x for sample in samples for x in sample.rollout_logprobs]
    assert reported == pytest.approx(logprobs(policy, samples), abs=tolerance(policy))


@ON_A_CPU
@pytest.mark.parametrize("started", ["qwen3_moe"], indirect=True)
def test_experts_that_vllm_names_without_their_module_are_checked_one_by_one(started, monkeypatch):
    """vLLM 0.26 reports ``experts.w13_weight`` of ``experts.routed_experts.w13_weight``."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers.fused_moe.runner import moe_runner  # pyright: ignore[reportMissingImports]

    engine, policy = started
    reported, wrong, load_weights = set(), set(), RoutedExperts.load_weights

    def as_0_26(self, weights):
        for name in load_weights(self.routed_experts, ((n, 2 * w if n in wrong else w) for n, w in weights)):
            reported.add(name)
            yield name

    monkeypatch.setattr(moe_runner.MoERunner, "load_weights", as_0_26)
    with engine.awake(0):
        asked = prompts("some words to begin with", "1+1=")
        groups = generate(engine, asked, SamplingParams(max_completion_tokens=16), seeds(2, 3, 0))
    assert reported == {"w13_weight", "w2_weight"}
    samples = [sample for group in groups for sample in group.samples]
    found = [x for sample in samples for x in sample.rollout_logprobs]
    assert found == pytest.approx(logprobs(policy, samples), abs=tolerance(policy))
    for name, stack in (("3.up_proj.weight", "w13"), ("0.down_proj.weight", "w2")):
        wrong.clear()
        wrong.add(name)
        expected = rf"checksums of model\.layers\.0\.mlp\.experts\.routed_experts\.{stack}_weight, \S+ \(2 in all\)"
        with pytest.raises(DeliveryError, match=expected), engine.awake(1):
            pass
