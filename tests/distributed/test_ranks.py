"""The loss and its gradient do not depend on ranks, micro-batches or order: 2 and 4 gloo processes against one."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from leading import save_led

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_model(
        tmp_path_factory.mktemp("teacher"), hidden_size=48, num_hidden_layers=3, tie_word_embeddings=False
    )


def make_model(folder, **sizes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "tie_word_embeddings": True} | sizes
    config = transformers.Qwen3Config(
        vocab_size=61, intermediate_size=48, num_attention_heads=4, head_dim=16,
        max_position_embeddings=128, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compute(model, on_ranks):
    return partial(on_ranks, model)


def gradient_error(got, want):
    error = sum((got["gradients"][n] - g).double().square().sum().item() for n, g in want["gradients"].items())
    return (error / sum(g.double().square().sum().item() for g in want["gradients"].values())) ** 0.5


def assert_same(got, want, most=2e-6):
    assert want["sums"]["tokens"] > 100
    assert got["sums"] == pytest.approx(want["sums"], rel=1e-5, abs=1e-6)
    error = gradient_error(got, want)
    print(f"loss {got['sums']['loss']:.9f} against {want['sums']['loss']:.9f}, relative gradient error {error:.1e}")
    assert error < most
    assert got["moved"]


LOSSES = [
    {"aggregate": "token"},
    {"aggregate": "sample", "kl_coef": 0.3},
    {"aggregate": "constant"},
    {"ratio": "sequence", "aggregate": "sample", "clip_low": 0.05, "clip_high": 0.05, "off_policy": True},
    {"objective": "cispo", "mask_overlong": True, "rollout_correction": "token_mask",
     "rollout_correction_cap": 1.2, "off_policy": True},
    {"kl_coef": 0.3, "kl_estimator": "k1", "entropy_coef": 0.1, "rollout_correction": "sequence_truncate",
     "rollout_correction_cap": 1.2, "off_policy": True},
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "loss"), [*((2, loss) for loss in LOSSES), *((4, loss) for loss in LOSSES[:3])], ids=str
)
def test_an_update_on_several_ranks_equals_that_on_one(compute, ranks, loss):
    assert_same(compute(ranks, **loss), compute(**loss))


KEPT = {"most_kept": 99, "beginning": 12, "token_budget": 44}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"ratio": "sequence", "aggregate": "sample", "clip_low": 0.05, "clip_high": 0.05, "off_policy": True}),
        (2, {"kl_coef": 0.3, "activation_checkpointing": "full"}),
        (2, {"kl_coef": 0.3, "lora_rank": 4, "activation_checkpointing": "attention"}),
    ],
    ids=str,
)
def test_a_prefix_that_is_kept_for_several_passes(compute, ranks, changes):
    """All prompts begin alike and do not fit a micro-batch; ranks have unequal numbers of passes."""
    whole = {"beginning": KEPT["beginning"]} | changes
    got, want = compute(ranks, **KEPT, **changes), compute(**whole)
    assert got["kept"] > 1 and want["micro_batches"] == 1
    assert_same(got, want)
    again = compute(ranks, **KEPT | {"most_kept": 0}, **changes)
    assert got["metrics"]["tokens/packed"] < again["metrics"]["tokens/packed"]
    assert got["metrics"]["tokens/repeated"] == want["metrics"]["tokens/repeated"]


@pytest.fixture(scope="module")
def windowed(tmp_path_factory, on_ranks):
    """A model with sinks and a mixture of experts, whose window is shorter than most samples."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, initializer_range=0.2, num_local_experts=4, num_experts_per_tok=2, sliding_window=5,
        max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("windowed")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return partial(on_ranks, folder)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(2, {}), (4, {}), (2, {"token_budget": 40, "activation_checkpointing": "full"}), (1, {"attention": "repeated"})],
    ids=str,
)
def test_a_windowed_model_with_sinks(windowed, ranks, changes):
    got, want = windowed(ranks, **changes), windowed()
    assert_same(got, want)
    sinks = [name for name in want["gradients"] if name.endswith("sinks")]
    assert len(sinks) == 2 and all(want["gradients"][name].norm() > 0 for name in sinks)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory, on_ranks):
    """Layers with a state and with attention, each with a mixture of experts."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "qwen3_5_moe_text", vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, initializer_range=0.2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=24, linear_key_head_dim=8, linear_value_head_dim=12, linear_num_key_heads=2,
        linear_num_value_heads=4, layer_types=["linear_attention", "linear_attention", "full_attention"],
        max_position_embeddings=128, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hybrid")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return partial(on_ranks, folder)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {"token_budget": 40, "activation_checkpointing": "full"}),
        (4, {}),
        (4, {"fsdp_size": 2, "lora_rank": 2, "lora_targets": ["in_proj_qkv", "q_proj", "down_proj", "experts"]}),
        (1, {"attention": "repeated"}),
    ],
    ids=str,
)
def test_a_model_with_states_and_experts(hybrid, ranks, changes):
    """In float32 the rule solves triangular systems, whose rounding depends on the lengths that are computed together."""
    want = hybrid(**{key: changes[key] for key in changes.keys() & {"lora_rank", "lora_targets"}})
    assert_same(hybrid(ranks, **changes), want, most=1e-4)
    wanted = "lora_" if "lora_rank" in changes else "A_log"
    found = [name for name in want["gradients"] if wanted in name]
    if "lora_rank" in changes:
        assert len([name for name in found if ".experts.lora_" in name]) == 3 * 2 * 2
    assert len(found) >= 2 and all(want["gradients"][name].norm() > 0 for name in found)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [(1, {"activation_checkpointing": "attention"}), (2, {"kl_coef": 0.3, "activation_checkpointing": "full"}),
     (2, {"kl_coef": 0.3, "lora_rank": 4})],
    ids=str,
)  # fmt: skip
def test_states_of_a_prefix_that_is_kept_for_several_passes(hybrid, ranks, changes):
    got, want = hybrid(ranks, **KEPT, **changes), hybrid(beginning=KEPT["beginning"], **changes)
    assert got["kept"] > 1 and want["micro_batches"] == 1
    assert_same(got, want, most=1e-4)


@pytest.mark.parametrize(("ranks", "dtype", "together"), [(2, "float32", 2), (4, "float32", 1), (2, "bfloat16", 1)])
def test_adapters_beside_experts_on_several_ranks(windowed, ranks, dtype, together):
    """Ranks have shards of the adapters, and parts of a batch's rows; the reference is the policy without adapters."""
    changes = {"lora_rank": 3, "lora_targets": ["experts"], "kl_coef": 0.3, "lr": 1e-3, "pushed": True}
    of_ranks = {"dtype": dtype, "activation_checkpointing": "full", "sequence_parallel_size": together}
    got, want = windowed(ranks, **of_ranks, **changes), windowed(**changes)
    assert want["metrics"]["kl"] > 1e-3
    assert len(adapter_names(want)) == 2 * 2 * 2
    for result in (got, want):
        assert list(result["gradients"]) == result["moved"] == adapter_names(want)
        assert all(gradient.dtype == torch.float32 and gradient.norm() > 0 for gradient in result["gradients"].values())
    if dtype == "float32":
        assert_same(got, want)
    else:
        assert 1e-4 < gradient_error(got, want) < 0.1
    assert got["pushed"].keys() == want["pushed"].keys() and len(want["pushed"]) > 20
    most = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
    for name, weight in want["pushed"].items():
        torch.testing.assert_close(got["pushed"][name], weight, atol=most, rtol=most)


def test_a_head_that_caps_its_logits_on_two_ranks(tmp_path, on_ranks):
    """Its gradient comes from autograd through the model's own head, whose weight is sharded, and tied to the embedding."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, initializer_range=0.2, sliding_window=5, query_pre_attn_scalar=16, final_logit_softcapping=2.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert_same(on_ranks(tmp_path, 2), on_ranks(tmp_path))


def test_a_reference_in_host_memory_computes_the_same(compute):
    loss = {"aggregate": "sample", "kl_coef": 0.3}
    got, want = compute(2, ref_offload="cpu", **loss), compute(2, **loss)
    assert got["sums"] == want["sums"]
    assert gradient_error(got, want) == 0
    assert_same(got, compute(**loss))


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_a_teacher_is_sharded_and_may_be_in_host_memory(compute, teacher, form):
    loss = {"teacher": str(teacher), "teacher_kl": form, "kl_coef": 0.3, "token_budget": 100}
    got, want = compute(2, teacher_offload="cpu", **loss), compute(2, **loss)
    assert got["sums"] == want["sums"] and got["sums"]["teacher_kl"] > 0.3 * got["sums"]["tokens"]
    assert gradient_error(got, want) == 0
    alone = compute(**loss)
    assert_same(got, alone)
    assert want["held_of_teacher"] < 0.55 * alone["held_of_teacher"]  # nothing stays gathered after the step
    rounded = compute(1, dtype="bfloat16", **loss)  # FSDP casts, on one rank
    assert gradient_error(rounded, alone) < 0.04


@pytest.mark.parametrize(
    ("fsdp_size", "changes"),
    [(2, {"lora_rank": 2}), (2, LOSSES[1]), (2, {"dtype": "bfloat16"}), (1, LOSSES[1])],
    ids=str,
)
def test_hybrid_sharding(compute, fsdp_size, changes):
    """Four ranks, two (four) copies of the weights: each rank holds a half (all) of them, and the step is that of one rank."""
    got, want = compute(4, fsdp_size=fsdp_size, **changes), compute(**changes)
    if "dtype" in changes:
        assert gradient_error(got, want) < 0.02
    else:
        assert_same(got, want)
        assert got["metrics"]["grad_norm"] == pytest.approx(want["metrics"]["grad_norm"], rel=1e-5)
    assert got["held"] == pytest.approx(want["held"] / fsdp_size, rel=0.02)


@pytest.mark.parametrize(("token_budget", "micro_batches"), [(200, 1), (165, 2), (100, 3), (26, 11)])
def test_micro_batches(compute, token_budget, micro_batches):
    got = compute(token_budget=token_budget)
    assert got["micro_batches"] == micro_batches
    assert_same(got, compute(aggregate="token"))


@pytest.mark.parametrize("loss", LOSSES[3:], ids=str)
def test_micro_batches_of_other_losses(compute, loss):
    got, want = compute(token_budget=40, **loss), compute(**loss)
    assert got["micro_batches"] > want["micro_batches"] == 1
    assert_same(got, want)
    assert gradient_error(want, compute(aggregate="token")) > 1e-2
    if "rollout_correction" in loss:
        assert 0 < want["sums"]["corrected"] < want["sums"]["tokens"]  # some were truncated or masked


def test_order_and_repeated_prompts(compute):
    assert_same(compute(reverse=True), compute(aggregate="token"))
    assert_same(compute(attention="repeated"), compute(aggregate="token"))


@pytest.mark.parametrize(("ranks", "token_budget", "saved"), [(1, 10_000, 5), (1, 210, 4), (2, 210, 4), (4, 210, 0)])
def test_prompts_that_share_a_beginning(compute, ranks, token_budget, saved):
    """A forest of three depths, whole or cut by the budget and between ranks, against a row of its own for every token. Six prompts
    have a gradient; on four ranks they are too few to wait for each other, so each has a tree of its own."""
    got = compute(ranks, beginning=90, token_budget=token_budget)
    want = compute(beginning=90, attention="repeated")
    assert_same(got, want)
    assert want["metrics"]["tokens/shared_above_prompt"] == 0
    assert got["metrics"]["tokens/shared_above_prompt"] == 90 * saved


def test_two_ranks_with_small_micro_batches(compute):
    assert_same(compute(2, token_budget=40), compute(aggregate="token"))


@pytest.mark.parametrize("again", ["matmuls", "attention", "full"])
def test_two_ranks_that_compute_activations_again(compute, again):
    assert_same(compute(2, activation_checkpointing=again), compute(aggregate="token"))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize(
    "more", [{"updates_per_step": 2}, {"epochs_per_step": 2}, {"updates_per_step": 2, "epochs_per_step": 2}]
)
def test_several_updates_a_step(compute, more, ratio):
    """The later updates' old log-probs were recorded before the first: their ratios are not 1."""
    changes = {"lr": 1e-2, "kl_coef": 0.1, "ratio": ratio, **more}
    got, want = (compute(ranks, **changes)["metrics"] for ranks in (2, 1))
    assert want["clip_ratio/low_mean"] + want["clip_ratio/high_mean"] > 0
    for name in ("loss", "grad_norm", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"):
        assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name


def test_bfloat16_on_one_rank_keeps_float32_masters(compute):
    got, want = compute(dtype="bfloat16"), compute(aggregate="token")
    assert all(g.dtype == torch.float32 for g in got["gradients"].values())
    assert 1e-4 < gradient_error(got, want) < 0.1


@pytest.mark.parametrize(("ranks", "fsdp_size", "whole"), [(1, None, True), (2, 1, True), (2, None, False)])
def test_whole_gradients_are_reduced_once_for_all_micro_batches(compute, ranks, fsdp_size, whole):
    """Each parameter's; a rank with a shard reduces those of each micro-batch. On one rank, which adds up the same numbers in the
    same order, no bit changes."""
    once = compute(ranks, dtype="bfloat16", token_budget=40, fsdp_size=fsdp_size)
    each = compute(ranks, dtype="bfloat16", token_budget=40, fsdp_size=fsdp_size, reduce_each=True)
    assert once["micro_batches"] > 2
    assert once["reductions"] == len(once["gradients"]) * (1 if whole else once["micro_batches"])
    assert each["reductions"] == len(once["gradients"]) * once["micro_batches"]
    assert once["reductions_of_step"] == once["reductions"]
    assert gradient_error(once, each) <= (0 if ranks == 1 else 1e-6)
    assert once["metrics"]["grad_norm"] == pytest.approx(each["metrics"]["grad_norm"], rel=1e-6)


LORA = {"lora_rank": 3, "kl_coef": 0.3}


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {"dtype": "bfloat16"}),
        (1, {"dtype": "bfloat16"} | LORA),
        (2, {}),
        (2, LORA),
        (4, {"fsdp_size": 2, "token_budget": 40}),
    ],
    ids=str,
)
def test_layers_that_stay_gathered_are_gathered_once_an_update(compute, ranks, changes):
    """The other layers for each forward and backward of a micro-batch, with LoRA also for its pass without adapters, which is the
    reference. No bit of the update depends on it, and behind it no layer is gathered."""
    several = {"token_budget": 60, "lr": 1e-3} | changes
    every, first, none = (compute(ranks, stay_gathered=count, **several) for count in (2, 1, 0))
    for other in (every, first):
        assert other["sums"] == none["sums"]
        for what in ("gradients", "after"):
            assert none[what] and other[what].keys() == none[what].keys()
            assert all(torch.equal(other[what][name], x) for name, x in none[what].items())
    assert none["moved"] and none["micro_batches"] > 1
    times, layers = (
        (3 if "lora_rank" in changes else 2) * none["micro_batches"],
        ("model.model.layers.0", "model.model.layers.1"),
    )
    assert every["gathers_of_step"] == {"": 1} | dict.fromkeys(layers, 1)
    assert first["gathers_of_step"] == {"": 1, layers[0]: 1, layers[1]: times}
    assert none["gathers_of_step"] == {"": 1} | dict.fromkeys(layers, times)
    assert every["gathered"] == first["gathered"] == none["gathered"] == []


def adapter_names(result):
    return [name for name in result["names"] if ".lora_" in name]


@pytest.mark.parametrize("ranks", [2, 4])
def test_lora_on_several_ranks(compute, ranks):
    """The reference is the policy's own frozen weights, and new adapters are the same on all ranks."""
    changes = {"lora_rank": 3, "kl_coef": 0.3, "lr": 1e-3}
    got, want = compute(ranks, **changes), compute(**changes)
    assert_same(got, want)
    assert want["metrics"]["kl"] > 1e-3
    for result in (got, want):
        assert len(adapter_names(result)) == 2 * 2 * 7
        assert list(result["gradients"]) == result["moved"] == adapter_names(result)


@pytest.mark.parametrize("ranks", [1, 2])
def test_lora_beside_bfloat16_weights_trains_float32_adapters(compute, ranks):
    changes = {"lora_rank": 3, "kl_coef": 0.3, "lr": 1e-3}
    got, want = compute(ranks, dtype="bfloat16", **changes), compute(**changes)
    assert all(g.dtype == torch.float32 for g in got["gradients"].values())
    assert list(got["gradients"]) == got["moved"] == adapter_names(got)
    error = gradient_error(got, want)
    print(f"relative gradient error {error:.1e}, kl {got['metrics']['kl']:.3g}")
    assert 1e-4 < error < 0.1


def test_a_wrong_share_is_noticed(compute):
    """The comparison can fail: the gradient of half of the tokens is not the same."""
    want = compute(aggregate="token")
    assert gradient_error(compute(aggregate="constant"), want) > 1e-2


EVERYTHING = [
    "loss.preset=gspo", "loss.scale_advantages=batch", "loss.kl_coef=0.05", "loss.ref_refresh_every=2",
    "loss.mask_overlong=true", "loss.entropy_coef=0.01", "loss.rollout_correction=token_mask", "rollout.resample_limit=2",
    "rollout.group_size=4", "train.updates_per_step=2", "train.epochs_per_step=2", "optim.eps=1e-3",
]  # fmt: skip


@pytest.fixture(scope="module")
def quickstart(warm, tmp_path_factory):
    """``quickstart(ranks, changes)``: the rows and completions of three steps; each run is made once."""
    model = tmp_path_factory.mktemp("quickstart") / "model"  # warm-started: it writes sums, and some of them are right
    done = warm.run([ROOT / "scripts" / "make_tiny_model.py", "--out", model])
    assert done.returncode == 0, done.stderr
    made = {}

    def run(ranks, changes):
        if (ranks, *changes) not in made:
            run_dir = tmp_path_factory.mktemp("run") / "run"
            keys = [f"model.path={model}", f"run_dir={run_dir}", "train.steps=3", "rollout.prompts_per_step=8"]
            keys += ["eval.every=3", "eval.rows=9", "track.console=false", "checkpoint.every=0", *changes]
            for process in warm.run_on_ranks(["-m", "pgrpo", "train", "--config", "quickstart", *keys], ranks):
                assert process.returncode == 0, process.stderr
            metrics, completions = (
                [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
                for name in ("metrics", "completions")
            )
            made[ranks, *changes] = metrics, [row["completion"] for row in completions]
        return made[ranks, *changes]

    return run


@pytest.mark.parametrize(("ranks", "changes"), [(2, []), (4, []), (2, EVERYTHING)])
def test_a_whole_run_on_several_ranks_equals_that_on_one(ranks, changes, quickstart):
    (one, texts), (several, texts_of_several) = quickstart(1, changes), quickstart(ranks, changes)
    assert [r["step"] for r in several] == [0, 1, 2, 3]
    for a, b in zip(one, several, strict=True):
        for name in a:
            if not name.startswith(("time/", "perf/", "tokens/")):  # a rank short of work runs a filler
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
    if changes:
        assert sum(r["resampling/groups"] for r in one[1:]) > 0
        assert one[2]["kl"] > one[3]["kl"] > 0  # the reference was refreshed in between
    assert texts_of_several == texts


def test_tools_in_worker_processes_on_two_ranks_equal_those_on_one(tmp_path, warm):
    """Each rank plays its own episodes: conversations that are led, rewritten and branch, with LoRA."""
    config, rows, texts = save_led(tmp_path), [], []
    for n in (1, 2):
        keys = [f"run_dir={tmp_path / f'run{n}'}", "train.steps=2", "eval.every=2", "checkpoint.every=0"]
        for process in warm.run_on_ranks(["-m", "pgrpo", "train", "--config", config, *keys], n):
            assert process.returncode == 0, process.stderr
        rows.append([json.loads(line) for line in (tmp_path / f"run{n}" / "metrics.jsonl").read_text().splitlines()])
        texts.append(
            [json.loads(line) for line in (tmp_path / f"run{n}" / "completions.jsonl").read_text().splitlines()]
        )
    one, several = ([row["completion"] for row in each] for each in texts)
    assert one == several
    for a, b in zip(*rows, strict=True):
        for name in a:
            if not name.startswith(("time/", "perf/", "tokens/")) and "seconds" not in name:
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


def test_ranks_share_a_run_folder_that_is_named_after_the_time(tiny_model, tmp_path, warm):
    keys = [f"model.path={tiny_model}", f"run_dir={tmp_path}/run_${{now:%f}}", "train.steps=1", "eval.every=0"]
    keys += ["rollout.prompts_per_step=2", "rollout.group_size=2", "track.console=false"]
    for rank in warm.run_on_ranks(["-m", "pgrpo", "train", "--config", "quickstart", *keys], 2):
        assert rank.returncode == 0, rank.stderr
    (folder,) = tmp_path.glob("run_*")
    assert (folder / "checkpoints" / "step_1" / "manifest.json").is_file() and (folder / "metrics.jsonl").is_file()
