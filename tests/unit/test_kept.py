"""A prefix that is kept for several passes: log-probs and gradients against the untouched model, one sample a call, in float64;
how a step is divided so that ranks stay in step; and a training with it."""

import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_linear import fake_fla
from transformers import AutoConfig

from pgrpo.admission.proof import Proof
from pgrpo.admission.shrink import shrink
from pgrpo.admission.twins import True64, default_dtype
from pgrpo.admission.twins import twins as small_twins
from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.grouped import grouped_attention
from pgrpo.attention.layout import PackedLayout
from pgrpo.attention.reference import reference_attention
from pgrpo.config import load_config
from pgrpo.distributed.world import World
from pgrpo.grpo import grpo_step
from pgrpo.model import recompute
from pgrpo.model.families import delta_rule
from pgrpo.model.kept import kept_prefix
from pgrpo.model.policy import Kept, Policy
from pgrpo.model.recompute import set_up_layers
from pgrpo.packing import balance
from pgrpo.packing.balance import share_out
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Work, length
from pgrpo.placement import layers
from pgrpo.placement.sizes import plan_sizes
from pgrpo.planning.dims import ModelDims, decoder_layers
from pgrpo.planning.kept import kept_text, longest_kept, why_none_kept
from pgrpo.planning.memory import memory_plan
from pgrpo.training import build as building
from pgrpo.training.build import build
from pgrpo.training.caller import Given
from pgrpo.training.progress import Progress
from pgrpo.training.update import spans
from pgrpo.types import Recompute, Sample

ROOT = Path(__file__).resolve().parents[2]
RECOMPUTE: list[Recompute] = ["none", "attention", "full"]


def rows(each: Work) -> np.ndarray:
    return each.rows.astype(float)


def samples_of(seed: int, prompts=(9, 17), beginning=9, group_size=6) -> list[Sample]:
    """Groups whose prompts begin alike; completions of 0 to 9 tokens, some masked, some of equal beginnings."""
    rnd = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rnd.randrange(3, 60) for _ in range(n)]

    common, samples = ids(beginning), []
    for prompt in prompts:
        prompt_ids, first = common + ids(prompt - beginning), ids(3)
        for i in range(group_size):
            tokens = (first if i % 3 == 0 else []) + ids(rnd.randint(i > 1, 6))
            mask = [rnd.random() < 0.8 for _ in tokens]
            weights = [rnd.uniform(-1, 1) * m for m in mask]
            samples.append(Sample(prompt_ids, tokens, mask, [0.0] * len(mask), advantages=weights))
    return samples


def weighted(rows_of_logprobs, batch):
    """A loss with a weight a token, which samples carry as advantages."""
    return (rows_of_logprobs * batch.advantages.to(rows_of_logprobs)).sum()


def plan_of(samples, budget, ranks=1, most_kept=99, attention=AttentionChoice()):
    return share_out(samples, ranks, budget, rows, attention, most_kept=most_kept)


def run(policy: Policy, batches) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
    """Log-probs of each sample, by its number, and gradients of ``weighted``."""
    policy.zero_grad(set_to_none=True)
    found = {}
    for span in spans(batches):
        with kept_prefix(policy, span):
            for batch in span:
                out = batch.unpack(policy(batch).logprobs)
                torch.autograd.backward(weighted(out, batch))
                found |= dict(enumerate(out.detach(), len(found)))
    return found, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]


def wanted_of(model, samples):
    """The same of the untouched model: one unpadded sample a call."""
    model.zero_grad(set_to_none=True)
    found = []
    for s in samples:
        ids, start = torch.tensor([s.prompt_ids + s.token_ids]), len(s.prompt_ids)
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, ids[0, start:, None]).squeeze(-1))
        (found[-1] * torch.tensor(s.advantages, dtype=torch.float64)).sum().backward()
    return [f.detach() for f in found], [
        torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()
    ]


def error(got, wanted):
    off = sum((a - b).square().sum().item() for a, b in zip(got, wanted, strict=True))
    return (off / sum(b.square().sum().item() for b in wanted)) ** 0.5


MODELS = {
    "qwen3": {},
    "gemma3_text": {"sliding_window": 4096},
    "gpt_oss": {},
    "qwen3_5_text": {},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
}
STATES = ["qwen3_5_text", "lfm2"]


@pytest.fixture(scope="module", params=MODELS)
def twins(request):
    config = AutoConfig.for_model(request.param, **MODELS[request.param])
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float64):
        return small_twins(shrink(config), 0)


@pytest.fixture(scope="module")
def wanted(twins):
    with True64():
        return wanted_of(twins[0], samples_of(0))


def kept_batches(policy, budget=30):
    (plan,) = plan_of(samples_of(0), budget)
    return plan, [build_batch(forest, attention=policy.attention) for forest in plan]


def policy_of(model, mode: Recompute = "none", way: Any = "between_depths"):
    layers = decoder_layers(model)
    set_up_layers(layers, [mode for _ in layers], compiled=False)
    return Policy(model, attention=AttentionChoice(way=way))


@pytest.mark.parametrize("way", ["between_depths", "copied_keys"])
def test_passes_are_exact_in_float64(twins, wanted, way):
    with True64():
        policy = policy_of(twins[1], way=way)
        plan, batches = kept_batches(policy)
        assert len(plan) > 2 and [f.kept for f in plan] == [9] * len(plan) and batches[0].span == len(plan)
        found, gradients = run(policy, batches)
    numbers = [samples_of(0).index(s) for forest in plan for s in forest.samples]
    for place, number in enumerate(numbers):
        row = wanted[0][number]
        assert torch.allclose(found[place][: len(row)], row, rtol=0, atol=1e-12)
    assert error(gradients, wanted[1]) < 1e-12


def run_mode(model, mode):
    policy = policy_of(model, mode)
    return run(policy, kept_batches(policy)[1])


def test_recomputation_changes_no_bit(twins):
    gradients = {mode: run_mode(twins[1], mode)[1] for mode in RECOMPUTE}
    for mode in RECOMPUTE[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[mode], gradients["none"], strict=True)), mode


@pytest.mark.slow
@pytest.mark.parametrize("twins", ["qwen3"], indirect=True)
@pytest.mark.parametrize("mode", ["attention"])
def test_passes_run_compiled_and_the_prefix_does_not(twins, mode, monkeypatch):
    torch._dynamo.reset()
    recompute.compile_dynamic.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    layers = decoder_layers(twins[1])
    plain = run_mode(twins[1], "none")
    set_up_layers(layers, [mode for _ in layers], compiled=True)
    policy = Policy(twins[1])
    got = run(policy, kept_batches(policy)[1])
    assert error(got[1], plain[1]) < 1e-6  # norms run in float32 in any model
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    run(policy, kept_batches(policy, budget=34)[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    recompute.compile_dynamic.cache_clear()


def without_the_last_row(policy, span):
    """Seeded bug: first tokens are predicted, and give the prefix no gradient."""
    assert policy.kept is not None
    return Kept(policy.kept.last_1E.detach(), policy.kept.fronts)


def without_a_layer(policy, span):
    """Seeded bug: the first layer's keys and values are cut off."""
    assert policy.kept is not None
    cut = tuple(x.detach() for x in policy.kept.fronts[0])
    return Kept(policy.kept.last_1E, [cut, *policy.kept.fronts[1:]])


@pytest.mark.parametrize("bug", [without_the_last_row, without_a_layer])
def test_a_gradient_that_is_lost_is_noticed(twins, wanted, bug, monkeypatch):
    with True64():
        policy = policy_of(twins[1])
        _, batches = kept_batches(policy)
        policy.zero_grad(set_to_none=True)
        with kept_prefix(policy, batches):
            policy.kept = bug(policy, batches)
            for batch in batches:
                torch.autograd.backward(weighted(batch.unpack(policy(batch).logprobs), batch))
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    assert error(gradients, wanted[1]) > 1e-3


def of_the_part(part, change):
    """Kept prefixes of which ``change`` replaces one part in the first layer: 0 the convolution's last inputs, 1 the state."""

    def changed(kept: Kept) -> Kept:
        first = [change(x) if i == part else x for i, x in enumerate(kept.fronts[0])]
        assert part < len(first)
        return Kept(kept.last_1E, [first, *kept.fronts[1:]])

    return changed


@pytest.mark.parametrize("change", [torch.zeros_like, torch.detach, lambda x: x.flip(-1)], ids=["zero", "cut", "mixed"])
@pytest.mark.parametrize(("twins", "part"), [("qwen3_5_text", 0), ("qwen3_5_text", 1), ("lfm2", 0)], indirect=["twins"])
def test_a_state_that_is_wrong_is_noticed(twins, wanted, part, change):
    """Seeded bugs: a layer starts without the prefix's inputs or state, or with others; or they get no gradient."""
    with True64():
        policy = policy_of(twins[1])
        plan, batches = kept_batches(policy)
        policy.zero_grad(set_to_none=True)
        off = 0.0
        with kept_prefix(policy, batches):
            assert policy.kept is not None
            policy.kept = of_the_part(part, change)(policy.kept)
            for forest, batch in zip(plan, batches, strict=True):
                found = batch.unpack(policy(batch).logprobs)
                torch.autograd.backward(weighted(found, batch))
                for row, sample in zip(found.detach(), forest.samples, strict=True):
                    want = wanted[0][samples_of(0).index(sample)]
                    off = max(off, *(row[: len(want)] - want).abs().tolist(), 0.0)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    assert off < 1e-12 if change is torch.detach else off > 1e-3
    assert error(gradients, wanted[1]) > 1e-4


LENGTHS = {  # prompts, what they begin with, tokens that may be kept, budget
    "on and behind a chunk's end": ((64, 71), 64, 64, 90),
    "more than a chunk": ((135, 130), 129, 129, 150),
    "fewer tokens than a convolution reaches back": ((9, 17), 9, 2, 30),
    "one token": ((9, 17), 9, 1, 30),
    "a whole prompt": ((70,), 70, 99, 84),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("twins", STATES, indirect=True)
@pytest.mark.parametrize("way", ["on a CPU", "on a GPU"])
def test_states_of_any_length_are_exact(twins, lengths, way, monkeypatch):
    """Long nodes are several chunks of the rule; the GPU's way is a stand-in of fla-core by transformers' function."""
    if way == "on a GPU":
        for name, module in fake_fla([]).items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(delta_rule, "_in_buckets", delta_rule._on_gpu)
    prompts, beginning, most_kept, budget = LENGTHS[lengths]
    samples = samples_of(3, prompts, beginning)
    (plan,) = plan_of(samples, budget, most_kept=most_kept)
    assert len(plan) > 1 and {f.kept for f in plan} == {min(beginning, most_kept)}
    with True64():
        want = wanted_of(twins[0], samples)
        policy = policy_of(twins[1])
        found, gradients = run(policy, [build_batch(f, attention=policy.attention) for f in plan])
    for place, sample in enumerate(sample for forest in plan for sample in forest.samples):
        row = want[0][samples.index(sample)]
        assert torch.allclose(found[place][: len(row)], row, rtol=0, atol=1e-12)
    assert error(gradients, want[1]) < 1e-12


def test_attention_behind_a_front_is_that_of_the_reference():
    """The first node has no queries, in both ways and with a window; gradients too, and those of its keys and values."""
    torch.manual_seed(0)
    lengths, parents = [7, 3, 2, 4, 1], [-1, 0, 0, 1, 2]
    for way in ("between_depths", "copied_keys"):
        choice = AttentionChoice(way=way, windows=(5,))
        whole = PackedLayout(lengths, parents, "cpu", choice)
        behind = PackedLayout(lengths, parents, "cpu", choice, has_front=True)
        for window in (None, 5):
            q, k, v = (torch.randn(17, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
            wanted = reference_attention(q, k, v, whole, 0.3, window=window)[0][7:]
            out = grouped_attention(q[7:], k, v, behind, 0.3, window=window)
            assert torch.allclose(out, wanted, rtol=0, atol=1e-12)
            weights = torch.randn_like(out)
            for a, b in zip(
                torch.autograd.grad((out * weights).sum(), (q, k, v)),
                torch.autograd.grad((wanted * weights).sum(), (q, k, v)),
                strict=True,
            ):
                assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_prefix_is_kept_where_that_saves_more_than_it_costs():
    samples = samples_of(0)
    (kept_plan,), (again,) = plan_of(samples, 30), plan_of(samples, 30, most_kept=0)
    assert not any(f.kept for f in again) and all(f.span == 1 for f in again)
    counts = [build_batch(f).counts for f in kept_plan]
    work = [build_batch(f).work for f in kept_plan]
    assert (
        sum(c.packed for c in counts)
        == sum(w.rows.sum() for w in work)
        == sum(f.rows for f in kept_plan) - 9 * (len(kept_plan) - 1)
    )
    assert sum(c.packed for c in counts) < sum(f.rows for f in again)
    assert sum(c.repeated for c in counts) == sum(map(length, samples))
    assert all(f.rows <= 30 for f in kept_plan)
    # A rate at which a pass more costs as much as 1,000 rows: not kept.
    dear = AttentionChoice(flops_per_ns=1000 / 1e6)
    assert not any(f.kept for batches in plan_of(samples, 30, attention=dear) for f in batches)
    # What a memory plan has room for is all that is kept, and what is in the loss is not.
    assert {f.kept for f in plan_of(samples, 30, most_kept=5)[0]} == {5}
    early = [replace(s, prompt_ids=s.prompt_ids[:4], token_ids=s.prompt_ids[4:] + s.token_ids) for s in samples]
    early = [
        replace(s, **{n: [0.0] * len(s.token_ids) for n in ("mask", "rollout_logprobs", "advantages")}) for s in early
    ]
    assert {f.kept for f in plan_of(early, 30)[0]} == {4}


def test_rows_that_prompts_save_are_counted_over_passes_as_in_one():
    one = build_batch(plan_of(samples_of(0), 999)[0][0]).counts
    for prompts in ((13, 17), (20, 20, 20), (13,)):
        samples = samples_of(1, prompts=prompts)
        one = build_batch(plan_of(samples, 999)[0][0]).counts
        passes = [build_batch(f).counts for f in plan_of(samples, 32)[0]]
        assert len(passes) > 1
        assert sum(c.shared_above_prompt for c in passes) == one.shared_above_prompt


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_spans_begin_and_end_at_the_same_micro_batch_on_all_ranks(ranks):
    """Trees that need two to six passes, and others that need none."""
    samples = []
    for seed, size in enumerate((4, 24, 9, 2, 2, 3)):
        samples += samples_of(seed, prompts=(14,), beginning=14, group_size=size)
    plan = plan_of(samples, 30, ranks)
    assert len({len(batches) for batches in plan}) == 1
    assert len({tuple(f.span for f in batches) for batches in plan}) == 1
    seen = [id(s.token_ids) for batches in plan for f in batches if not f.is_filler for s in f.samples]
    assert sorted(seen) == sorted(id(s.token_ids) for s in samples)
    kept_somewhere = False
    for batches in plan:
        for span in spans([build_batch(f) for f in batches]):
            fronts = {b.kept.front for b in span if b.kept}
            prefixes = {tuple(b.inputs["input_ids"][: b.kept.front].tolist()) for b in span if b.kept}
            assert len(fronts) <= 1 and len(prefixes) <= 1 and (len(span) > 1 or not fronts)
            kept_somewhere |= bool(fronts)
        assert all(f.rows <= 30 for f in batches)
    assert kept_somewhere or ranks > 3


def test_a_failure_in_a_span_leaves_no_prefix_behind(twins):
    policy = policy_of(twins[1])
    _, batches = kept_batches(policy)
    with pytest.raises(ZeroDivisionError), kept_prefix(policy, batches):
        raise ZeroDivisionError
    assert policy.kept is None


def count_kept(monkeypatch) -> list[int]:
    """The tokens of each prefix that is kept in a training."""
    found, keep = [], Policy.keep

    def counted(self, batch):
        if batch.span > 1:  # not the proof's
            found.append(batch.kept.front)
        return keep(self, batch)

    monkeypatch.setattr(Policy, "keep", counted)
    return found


def ones(completions, **_):
    return [float("1" in text) for text in completions]


@pytest.mark.parametrize(
    "more", [("loss.kl_coef=0.1",), ("train.updates_per_step=2", "model.lora_rank=4", "loss.kl_coef=0.1")]
)
def test_a_training_is_that_of_a_larger_budget(tiny_model, tmp_path, monkeypatch, more):
    """Three steps of the quick start with prompts that begin alike: old log-probs and the reference keep prefixes too."""
    monkeypatch.setattr(balance, "KEEP_NS", 0.0)
    kept_rows = count_kept(monkeypatch)
    logged, counts = [], []
    for budget in (40, 4000):
        keys = [f"model.path={tiny_model}", f"run_dir={tmp_path / str(budget)}", "rewards.functions=[]", "eval.every=0"]
        keys += ["rollout.prompts_per_step=4", "rollout.group_size=6", "optim.lr=1e-3", "data.max_prompt_tokens=20"]
        keys += [f"train.token_budget={budget}", "rollout.max_completion_tokens=12", *more]
        dataset = [{"a": 1234567890, "b": i, "answer": "1"} for i in range(40)]
        config = load_config("quickstart", keys, rewards_from_python=True)
        with build(config, World(0, 1, torch.device("cpu")), Given((ones,), dataset=dataset)) as parts:
            assert parts.learner.most_kept == (20 if budget == 40 else 0)
            progress = Progress()
            for progress.step in range(3):
                logged.append(grpo_step(parts, progress)[1])
        counts.append(len(kept_rows))
    assert counts[0] == counts[1] >= 6 and min(kept_rows) >= 11
    for got, want in zip(logged[:3], logged[3:], strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl", "reward", "tokens/repeated"):
            assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name
        assert got["tokens/packed"] < want["tokens/repeated"]


def test_the_memory_plan_says_how_much_is_kept():
    dims = ModelDims.from_config(json.loads((ROOT / "benchmarks" / "qwen3_4b" / "config.json").read_text()))
    sizes = {"token_budget": 49_152, "dtype_bytes": 2, "recompute": ["full"] * dims.layers}
    none, some = memory_plan(dims, **sizes), memory_plan(dims, **sizes, kept_tokens=32_768)
    assert some.kept == 2 * 32_768 * 144 / 2**20 == 9.0  # 144 KiB a token, and gradients as large
    assert some.update - none.update == pytest.approx(9.0) and some.optimizer_step == none.optimizer_step
    with_states = replace(dims, state_elements=2**20)  # float32, and gradients: however many tokens
    assert memory_plan(with_states, **sizes, kept_tokens=32_768).kept == 9.0 + 2 * 4 / 1024
    assert memory_plan(with_states, **sizes).kept == 0
    assert "up to 7 tokens" in kept_text(7, 7) and "not 9" in kept_text(9, 7)
    assert kept_text(9, 0).startswith("none: the memory plan has no room")


@pytest.mark.parametrize(
    ("shape", "states", "teacher"),
    [("qwen3_4b", 0, None), ("qwen3_4b", 2**24, None), ("qwen3_1.7b_vocab_49152", 0, "qwen3_4b")],
)
def test_no_more_tokens_are_kept_than_the_memory_plan_has_room_for(shape, states, teacher, monkeypatch):
    """The peak with the larger teacher, of the full KL, is in its pass, beside what the policy keeps."""
    config = load_config("qwen3_0.6b.yaml")
    config.model.activation_checkpointing, config.data.max_prompt_tokens, config.train.token_budget = "full", 9000, 9600
    config.loss.teacher, config.loss.teacher_kl = teacher and str(ROOT / "benchmarks" / teacher), "full"
    shape = json.loads((ROOT / "benchmarks" / shape / "config.json").read_text())
    dims, world = replace(ModelDims.from_config(shape), state_elements=states), World(0, 1, torch.device("cuda"))
    sizes: dict[str, Any] = plan_sizes(config, dims, world, world.device)
    sizes["recompute"] = ["full"] * dims.layers
    none, some = (memory_plan(dims, **dict(sizes, kept_tokens=n)).update for n in (0, 5000))

    def keepable(room):
        monkeypatch.setattr(layers, "_capacity_gib", lambda *_: room)
        return layers.keepable_tokens(config, dims, world)

    assert keepable(some + 1e-6) == 5000 and keepable(some - 1e-6) == 4999
    assert keepable(none - 1) == keepable(none - 1e-3) == 0 and keepable(none + 99) == 9000


@pytest.mark.parametrize("of", ["policy", "teacher"])
def test_what_a_proof_says_against_it_is_heeded(tiny_model, tmp_path, monkeypatch, of):
    name = "check_model" if of == "policy" else "check_teacher"
    monkeypatch.setattr(building, name, lambda *_: Proof(not_kept="layers attend twice"))
    keys = [f"model.path={tiny_model}", f"run_dir={tmp_path}", "eval.every=0", "train.token_budget=24"]
    keys += [f"loss.teacher={tiny_model}", "rollout.prompts_per_step=4"]
    with build(load_config("quickstart", keys), World(0, 1, torch.device("cpu"))) as parts:
        assert parts.learner.most_kept == 0
        what = "layers attend twice" if of == "policy" else "of the teacher, layers attend twice"
        assert parts.notes == [
            f"kept prefixes: none, as {what}: a group that train.token_budget cuts computes its prompt in each of its micro-batches"
        ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"states": 5}, ""),
        ({"tower": True}, "the model sees images"),
        ({"not_kept": "layers attend twice"}, "layers attend twice"),
        ({"tower": True, "budget": 64}, ""),  # a whole group fits
        ({"tower": True, "attention": "repeated"}, ""),
    ],
)
def test_a_run_that_cannot_keep_a_prefix_says_why(changes, reason):
    """For groups of a prompt of 32 tokens and 4 completions of 8, in micro-batches of 48 unless said otherwise."""
    config = load_config("quickstart.yaml")
    config.data.max_prompt_tokens, config.rollout.max_completion_tokens, config.rollout.group_size = 32, 8, 4
    config.rollout.prompts_per_step, config.train.token_budget = 2, changes.get("budget", 48)
    config.model.attention = changes.get("attention", "grouped")
    shape = json.loads((ROOT / "benchmarks" / "qwen3_4b" / "config.json").read_text())
    tower: Any = object() if "tower" in changes else None
    dims = replace(ModelDims.from_config(shape), state_elements=changes.get("states", 0), tower=tower)
    text = why_none_kept(config, dims, changes.get("not_kept", ""))
    assert reason in text and bool(text) == bool(reason)
    assert longest_kept(config, dims) == (0 if "tower" in changes else 32)
