"""Grouped log-probs and gradients against the untouched transformers model, one unpadded sample a call."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from pgrpo.admission.compare import difference, gradients, reference_logprobs, tokens_as_samples
from pgrpo.admission.fits import check_positions, check_sampled_positions
from pgrpo.admission.models import check_model
from pgrpo.admission.seeded_bugs import SEEDED_BUGS
from pgrpo.attention.hook import ATTENTION_NAME, UnsupportedAttentionError, attending
from pgrpo.config import Config, ConfigError, ModelConfig
from pgrpo.model.logprobs import LOGITS_PER_CHUNK
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.recompute import set_up_layers
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest

TYPES = ("granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
}  # fmt: skip
OWN = {
    "granite": {
        "logits_scaling": 3.0,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
    },
    "qwen3": {"head_dim": 16},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}


def make_model(model_type, path, **changes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | OWN.get(model_type, {}) | changes))
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return str(path)


def samples():
    generator = torch.Generator().manual_seed(1)

    def ids(n):
        return torch.randint(3, 61, (n,), generator=generator).tolist()

    return tokens_as_samples(
        [ids(9), ids(1), ids(4)],
        [[ids(3), ids(5), ids(0), ids(1)], [ids(2), ids(2)], [ids(7), ids(1), ids(4)]],
    )


def pair(path, dtype):
    policy = Policy(load_model(ModelConfig(path=path)).to(dtype))
    untouched = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    return policy, untouched


def wanted(untouched, temperature=1.0):
    logprobs = reference_logprobs(untouched, samples(), temperature)
    return logprobs, gradients(logprobs, untouched)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", TYPES)
def test_float64_equals_the_untouched_model(model_type, tied, is_shared, tmp_path):
    policy, untouched = pair(make_model(model_type, tmp_path, tie_word_embeddings=tied), torch.float64)
    logprobs, wanted_gradients = wanted(untouched)
    batch = build_batch(Forest.of(samples()) if is_shared else Forest.repeated(samples()))
    got = difference(policy, batch, logprobs, wanted_gradients)
    assert got.logprob <= 1e-6
    assert got.gradient <= 1e-5
    for (name, _), grad, want in zip(
        policy.named_parameters(), gradients(policy(batch).logprobs, policy), wanted_gradients, strict=True
    ):
        # Of each parameter by itself: a small one could hide in the norm of all. Keys' biases have a gradient of 0.
        assert (grad - want).norm() <= 1e-5 * want.norm() + 1e-12, name


@pytest.mark.parametrize("model_type", TYPES)
def test_float32_error_is_at_most_one_and_a_half_times_the_untouched_models_own(model_type, tmp_path):
    path = make_model(model_type, tmp_path)
    truth, true_gradients = wanted(pair(path, torch.float64)[1])
    policy, untouched = pair(path, torch.float32)
    own_logprobs, own_gradients = wanted(untouched)
    own = (own_logprobs.double() - truth).norm()
    ours = (policy(build_batch(Forest.of(samples()))).logprobs.double() - truth).norm()
    assert ours <= 1.5 * own
    assert difference(policy, build_batch(Forest.of(samples())), truth, true_gradients).gradient <= 1e-5
    assert all(g.isfinite().all() for g in own_gradients)


@pytest.mark.parametrize("bug", SEEDED_BUGS)
def test_a_seeded_bug_is_noticed(bug, tmp_path):
    policy, untouched = pair(make_model("qwen3", tmp_path), torch.float64)
    batch = SEEDED_BUGS[bug](build_batch(Forest.of(samples())))
    assert batch is not None
    got = difference(policy, batch, *wanted(untouched))
    assert got.logprob > 1e-2
    assert got.gradient > 1e-2


@pytest.mark.parametrize("keep", ["none", "attention", "full"])
def test_temperature_and_checkpointing_change_nothing_but_what_they_should(tmp_path, keep):
    path = make_model("llama", tmp_path)
    model = load_model(ModelConfig(path=path)).double()
    set_up_layers(model.model.layers, [keep] * len(model.model.layers), compiled=False)
    _, untouched = pair(path, torch.float64)
    got = difference(
        Policy(model, temperature=0.7), build_batch(Forest.of(samples())), *wanted(untouched, temperature=0.7)
    )
    assert got.logprob <= 1e-6
    assert got.gradient <= 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("model_type", "changes", "scale"),
    [
        ("cohere", {"logit_scale": 0.25}, 0.25),
        ("phi", {"tie_word_embeddings": False}, None),  # a bias
        ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None, "head_dim": 8}, None),
        ("nanochat", {}, None),  # soft-capping in float32, by no key
        ("stablelm", {"tie_word_embeddings": True}, 1.0),  # its layers do not hand keywords down
        ("nemotron", {}, 1.0),
    ],
)
def test_a_head_of_any_kind_gives_the_log_probs_of_the_models_own_forward(
    model_type, changes, scale, temperature, monkeypatch
):
    monkeypatch.setitem(LOGITS_PER_CHUNK, "cpu", 61 * 4 * 5)  # several chunks, the last one shorter
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | changes))
    kind = "eager" if model_type == "gemma2" else "sdpa"
    untouched = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=kind)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=ATTENTION_NAME)
    model.double().load_state_dict(untouched.double().state_dict())
    policy = Policy(model, temperature)
    assert policy.head.scale == scale
    got = difference(policy, build_batch(Forest.of(samples())), *wanted(untouched, temperature))
    assert got.logprob <= 1e-5
    assert got.gradient <= 1e-5
    batch = build_batch(Forest.of(samples()))
    entropy, as_teacher = policy(batch, entropy=True).entropy, policy.teacher_rows(batch)
    first = samples()[1]
    ids = torch.tensor([first.prompt_ids + first.token_ids])
    logits = untouched(input_ids=ids).logits[0, len(first.prompt_ids) - 1 : -1] / temperature
    assert (entropy[3:8] - torch.distributions.Categorical(logits=logits).entropy()).abs().max() < 1e-5
    assert (as_teacher.scale * as_teacher.logits(slice(None), 61)[batch.pair_index[3:8]] - logits).abs().max() < 1e-5
    inputs = {"input_ids": ids[0], "position_ids": torch.arange(ids.shape[1])}
    layout = build_batch(Forest.of(tokens_as_samples([ids[0].tolist()], [[[]]]))).layout
    rows = policy.next_logits(inputs, layout, torch.tensor([3, 1]))
    assert (rows - untouched(input_ids=ids).logits[0, [3, 1]]).abs().max() < 1e-5


def test_entropy_is_that_of_the_untouched_models_distribution(tmp_path):
    policy, untouched = pair(make_model("granite", tmp_path), torch.float64)
    group = tokens_as_samples([[5, 6, 7]], [[[8, 9]]])
    entropy = policy(build_batch(Forest.of(group)), entropy=True).entropy
    logits = untouched(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2:4]
    assert (entropy - torch.distributions.Categorical(logits=logits).entropy()).abs().max() < 1e-9


ROTARY = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        (
            "llama",
            {"attention_dropout": 0.1},
            r"attention_dropout=0.1: rows that samples share .* set it to 0 in its con",
        ),
        (
            "mamba",
            {},
            r"mamba model: its attention does not call .*; log-probs differ .* part in backbone\.layers\.0\.mixer",
        ),
        (
            "llama",
            {"rope_parameters": ROTARY},
            "hidden states part in model.rotary_emb",
        ),
        (
            "phi3",
            {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
            "hidden states part in model.rotary_emb",
        ),
        ("llama4_text", {"attention_chunk_size": 32}, "not proven"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, r"weights are quantized \(mxfp4\)"),
        ("bloom", {}, "its attention does not call the hook"),
    ],
)
def test_what_would_be_wrong_is_refused_with_a_reason(model_type, changes, reason):
    config = transformers.AutoConfig.for_model(model_type, **{"max_position_embeddings": 32} | changes)
    for name in ("attention_dropout", "hidden_dropout"):
        if name not in changes and hasattr(config, name):
            setattr(config, name, 0.0)
    with pytest.raises(ConfigError, match=reason):
        check_model("m", config, max_sample=64)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"rope_parameters": ROTARY}),
        ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    ],
)
def test_a_length_that_no_sample_reaches_does_no_harm(model_type, changes):
    check_model(
        "m", transformers.AutoConfig.for_model(model_type, **{"max_position_embeddings": 64} | changes), max_sample=64
    )


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("model_type", "stated", "rope_parameters", "most"),
    [
        ("llama", 4096, {"rope_type": "default", "rope_theta": 1e4}, 4096),
        (
            "qwen3",
            40960,
            YARN | {"original_max_position_embeddings": 32768},
            131072,
        ),  # as Qwen's model cards tell users to set it
        ("qwen3", 131072, YARN | {"original_max_position_embeddings": 32768}, 131072),
        ("qwen2", 32768, YARN, 131072),
        ("llama", 2048, {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 8192),
        ("llama", 131072, LLAMA3 | {"original_max_position_embeddings": 8192}, 131072),  # Llama 3.1
    ],
)
def test_samples_longer_than_the_models_positions_are_refused(model_type, stated, rope_parameters, most, caplog):
    config = transformers.AutoConfig.for_model(
        model_type, max_position_embeddings=stated, rope_parameters=rope_parameters
    )
    caplog.clear()  # of what transformers says of such a config
    check_positions(ModelConfig(path="m"), config, most, "a limit")
    message = rf"model.path=m: it has {most} positions, the longest sample {most + 1} tokens \(data.max_prompt_tokens \+ a limit\)"
    with pytest.raises(ConfigError, match=message):
        check_positions(ModelConfig(path="m"), config, most + 1, "a limit")
    assert not caplog.records
    check_positions(ModelConfig(path="m", max_positions=most + 1), config, most + 1, "a limit")
    assert caplog.messages == [f"model.max_positions={most + 1} instead of {most}, by the model's config.json"]
    with pytest.raises(ConfigError, match="it has 5 positions, the longest sample 6 tokens"):
        check_positions(ModelConfig(path="m", max_positions=5), config, 6, "a limit")


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_vllm_computes_no_positions_beyond_a_table_of_yarn(kind):
    """Its table has 4 times 32,768 rows, whatever ``model.max_positions`` says; other kinds get a table of that length."""
    rope = YARN | {"rope_type": kind, "original_max_position_embeddings": 32_768}
    hf_config = transformers.AutoConfig.for_model("qwen3", max_position_embeddings=32_768, rope_parameters=rope)
    config = Config(model=ModelConfig(path="m", max_positions=140_000))
    config.data.max_prompt_tokens, config.rollout.max_completion_tokens = 131_072 - 64, 64
    check_sampled_positions(config, hf_config)
    config.rollout.max_completion_tokens += 1
    if kind == "linear":
        check_sampled_positions(config, hf_config)
    else:
        with pytest.raises(
            ConfigError, match=r"max_positions=140000: vLLM .* up to 131072 \(yarn\), the longest sample has 131073"
        ):
            check_sampled_positions(config, hf_config)


def test_the_bare_model_and_padded_batches_are_refused(tmp_path):
    path = make_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=ATTENTION_NAME)
    with pytest.raises(UnsupportedAttentionError, match="without its layout"):
        model(input_ids=torch.tensor([[3, 4]]))
    plan = build_batch(Forest.of(tokens_as_samples([[3, 4]], [[[5]]]))).layout
    ids = torch.tensor([[3, 4, 5]])
    with pytest.raises(UnsupportedAttentionError, match="packed row"), attending(plan):
        model(input_ids=ids.repeat(2, 1))
    with pytest.raises(UnsupportedAttentionError, match="padding mask"), attending(plan):
        model(input_ids=ids, attention_mask=torch.zeros(1, 1, 3, 3))
    with pytest.raises(UnsupportedAttentionError, match="without its layout"):
        model(input_ids=ids)  # the block is over
