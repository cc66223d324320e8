"""Ranks that compute a batch together (``model.sequence_parallel_size``) compute what one process computes, and what the untouched
model computes."""

import json
from functools import partial

import pytest
import torch
import transformers
from seeing import CONFIGS
from sequence_worker import compiled, images_in_float64, in_float64
from test_ranks import KEPT, LOSSES, assert_same, gradient_error, make_model

from pgrpo import checkpoint
from pgrpo.admission.fits import check_heads
from pgrpo.admission.rows import check_rows
from pgrpo.admission.shrink import shrink
from pgrpo.admission.twins import twins
from pgrpo.config import ConfigError
from pgrpo.model.policy import Policy
from pgrpo.planning.dims import ModelDims

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOWED = {
    "num_hidden_layers": 2, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of small models: of ``qwen3``; with one key/value head; ``gpt_oss``, with windows, sinks and experts; ``jetmoe``,
    whose layers take a view of what attention returns."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "plain")
    make_model(folder / "one_kv_head", num_key_value_heads=1)
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**(SMALL | WINDOWED))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "windowed")
    views = SMALL | {"kv_channels": 16, "num_local_experts": 2, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model("jetmoe", **views)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "views")
    return folder


@pytest.mark.parametrize(
    ("model", "ranks", "size", "beginning"),
    [
        ("plain", 2, 2, 0),
        ("plain", 4, 2, 0),  # two shares of data
        ("plain", 4, 4, 90),  # two key/value heads; the first rank has no token to predict
        ("one_kv_head", 2, 2, 0),
        ("windowed", 4, 4, 7),
        ("views", 4, 4, 0),  # one head a rank
    ],
)
def test_the_untouched_model_in_float64(processes, models, model, ranks, size, beginning):
    found = processes(ranks)(in_float64, models / model, size, beginning)
    for one in found:
        print(one)
        assert one.logprob < 1e-9 and one.gradient < 1e-9
    assert found[0].rows % size  # padded
    assert (found[0].owned == 0) == (beginning == 90)


@pytest.mark.parametrize(("ranks", "shared"), [(2, False), (4, True)])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen3_5"])
def test_images_that_lie_on_several_ranks_are_exact_and_computed_once_each(processes, name, ranks, shared):
    """Their rows lie on several ranks, each of which computes every image once."""
    found = processes(ranks)(images_in_float64, name, ranks, shared)
    for one in found:
        assert one.logprob < 1e-11 and one.gradient < 1e-11 and one.tower < 1e-11
        assert one.calls == 1
    assert sum(one.owned > 0 for one in found) > 1
    if shared:
        assert any(one.is_cut for one in found)  # an image whose rows are those of two ranks
        assert name == "llava_next" or any(one.owned == 0 for one in found)


@pytest.fixture(scope="module")
def compute(models, on_ranks):
    return partial(on_ranks, models / "plain")


FULL = {"kl_coef": 0.3, "entropy_coef": 0.1, "aggregate": "sample"}


@pytest.mark.parametrize(
    ("ranks", "size", "changes"),
    [
        (2, 2, FULL | {"token_budget": 40}),
        (4, 4, LOSSES[3]),
        (4, 2, LOSSES[4] | {"token_budget": 60, "activation_checkpointing": "matmuls"}),
        (4, 2, {"fsdp_size": 2, "activation_checkpointing": "full"}),
        (2, 2, {"lora_rank": 3, "kl_coef": 0.3, "lr": 1e-3}),
        (2, 2, {"beginning": 90, "attention": "repeated"}),
        (4, 4, {"activation_checkpointing": "offload", "mlp_chunks": 3}),
    ],
    ids=str,
)
def test_an_update_is_that_of_one_process(compute, ranks, size, changes):
    got, want = compute(ranks, sequence_parallel_size=size, **changes), compute(**changes)
    assert_same(got, want)
    names = ("loss", "grad_norm", "entropy", "kl", "tokens/packed", "tokens/repeated", "tokens/rho", "perf/flops")
    for name in (name for name in names if name in want["metrics"] and not (ranks > size and "token" in name)):
        assert got["metrics"][name] == pytest.approx(want["metrics"][name], rel=1e-4, abs=1e-6), name
    shards = changes.get("fsdp_size", ranks)
    assert got["held"] == pytest.approx(want["held"] / shards, rel=0.03)


@pytest.mark.parametrize(
    ("model", "ranks", "size", "changes"),
    [
        ("plain", 2, 2, {"kl_coef": 0.3, "activation_checkpointing": "attention"}),
        ("plain", 4, 4, {"activation_checkpointing": "full"}),  # two key/value heads
        (
            "plain",
            4,
            2,
            {"kl_coef": 0.3, "lora_rank": 3, "fsdp_size": 2},
        ),  # shares of data have unequal numbers of passes
        ("windowed", 4, 4, {"beginning": 13}),  # rows of the last rank: one, and three of padding
    ],
    ids=str,
)
def test_a_prefix_that_is_kept_for_several_passes(on_ranks, models, model, ranks, size, changes):
    """Each rank keeps it at its heads; the last row, which predicts first tokens, is where it was computed."""
    whole = {"beginning": KEPT["beginning"]} | changes
    several = partial(on_ranks, models / model, ranks, sequence_parallel_size=size)
    got, want = several(**KEPT | whole), on_ranks(models / model, **whole)
    assert got["kept"] > 1 and want["micro_batches"] == 1
    assert_same(got, want)
    again = several(**KEPT | whole | {"most_kept": 0})
    assert got["metrics"]["tokens/packed"] < again["metrics"]["tokens/packed"]


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_a_teacher(compute, models, form):
    changes = {"teacher": str(models / "one_kv_head"), "teacher_kl": form, "token_budget": 100}
    got, want = compute(2, sequence_parallel_size=2, **changes), compute(**changes)
    assert_same(got, want)
    assert got["sums"]["teacher_kl"] > 0.1 * got["sums"]["tokens"]


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_a_teacher_of_a_policy_that_keeps_a_prefix(compute, models, form):
    """Teacher and policy agree on the tokens of each rank."""
    changes = {"teacher": str(models / "one_kv_head"), "teacher_kl": form, "beginning": KEPT["beginning"]}
    got, want = compute(2, sequence_parallel_size=2, **KEPT | changes), compute(**changes)
    assert got["kept"] > 1
    assert_same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"token_budget": 60}, KEPT], ids=["", "kept"])
def test_compiled_layers(processes, models, more):
    """The exchange is traced, and once for all micro-batches, whose rows differ; those behind a kept prefix once more."""
    changes = {"sequence_parallel_size": 2, "activation_checkpointing": "attention"} | more
    for error, compilations in processes(2)(compiled, models / "plain", changes):
        assert error < 2e-6 and compilations == (1 if more is not KEPT else 2)


def test_bfloat16_is_as_far_from_float32_as_on_one_rank(compute):
    changes = {"dtype": "bfloat16"}
    one, two = compute(**changes), compute(2, sequence_parallel_size=2, **changes)
    far = [gradient_error(x, compute()) for x in (one, two)]
    assert 1e-4 < far[1] < 1.5 * far[0]


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint(models, warm, tmp_path):
    """At the same size bit for bit, and on one process within rounding."""
    model = tmp_path / "model"
    done = warm.run(["scripts/make_tiny_model.py", "--out", model])
    assert done.returncode == 0, done.stderr

    def train(name, ranks, *changes, resume=()):
        keys = [
            f"model.path={model}",
            f"run_dir={tmp_path / name}",
            "rollout.prompts_per_step=4",
            "rollout.group_size=4",
        ]
        keys += ["train.steps=3", "eval.every=3", "eval.rows=5", "track.console=false", "checkpoint.every=1"]
        keys += ["checkpoint.keep=9", "optim.eps=1e-3", "loss.kl_coef=0.05", "train.updates_per_step=2", *changes]
        for process in warm.run_on_ranks(["-m", "pgrpo", "train", "--config", "quickstart", *keys, *resume], ranks):
            assert process.returncode == 0, process.stderr
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return rows, checkpoint.load(tmp_path / name / "checkpoints" / "step_3")[0]

    two = "model.sequence_parallel_size=2"
    rows, weights = train("two", 2, two)
    one, _ = train("one", 1)
    for got, want in zip(rows, one, strict=True):
        for name in want:
            if not name.startswith(("time/", "perf/")):
                assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), name
    begin = ["--resume", tmp_path / "two" / "checkpoints" / "step_2"]
    _, same = train("same", 2, two, resume=begin)
    _, other = train("other", 1, resume=begin)
    for section in ("model", "optimizer"):
        for name, tensor in weights[section].items():
            assert torch.equal(same[section][name], tensor), name
        errors = [(other[section][name] - t).norm() / t.norm() for name, t in weights[section].items() if t.norm()]
        print(f"{section}: largest relative difference of a tensor {max(errors):.1e}")
        assert max(errors) < 2e-6


def test_heads_that_do_not_divide_are_refused():
    dims = ModelDims.from_config({"model_type": "qwen3"} | SMALL | {"num_attention_heads": 6})
    check_heads(3, dims)
    with pytest.raises(ConfigError, match="4 does not divide the model's 6 attention heads; it may be 1, 2, 3, 6"):
        check_heads(4, dims)
    per_layer = {"num_key_value_heads": 2, "num_attention_heads": 4, "num_attention_heads_per_layer": [4, 6]}
    dims = ModelDims.from_config(
        {"model_type": "laguna"} | SMALL | per_layer | {"num_experts": 2, "num_experts_per_tok": 1}
    )
    check_heads(2, dims)
    with pytest.raises(
        ConfigError, match=r"4 does not divide the model's 6 attention heads of some layers; it may be 1, 2$"
    ):
        check_heads(4, dims)


def test_rows_that_see_others_outside_of_attention_are_refused():
    plain = transformers.AutoConfig.for_model("qwen3", **SMALL)
    check_rows("x", plain, 200, 2)
    check_rows("x", transformers.AutoConfig.for_model("gpt_oss", **(SMALL | WINDOWED)), 200, 2)
    linear = transformers.AutoConfig.for_model("qwen3_next", **(SMALL | {"num_hidden_layers": 4}))
    check_rows("x", linear, 200, 1)
    with pytest.raises(
        ConfigError, match=r"sequence_parallel_size: 2 ranks cannot divide the rows of x: layers of this qwen3_next"
    ):
        check_rows("x", linear, 200, 2)
    Policy(twins(shrink(linear), 0)[1])  # from now on its layers ask the layout for states
    with pytest.raises(
        ConfigError, match=r"cannot divide the rows of x: .* \(on a small copy: they ask for states\); set it"
    ):
        check_rows("x", linear, 200, 2)
