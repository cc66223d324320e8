"""Decode attention that reads shared keys once, in Triton's interpreter; and when vLLM is told to use it."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shared_decode import Batch, batch, exact
from torch import Tensor

from pgrpo.config import Config, ConfigError
from pgrpo.rollout.vllm import shared_decode
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.rollout.vllm.shared_layout import DecodeLayout

PAGE = 4
CPU = torch.device("cpu")


def layout(sequences: int, heads: int = 4, key_heads: int = 2, **sizes: int) -> DecodeLayout:
    """Small sizes, and arrays as vLLM's sleep leaves them: full of anything."""
    small = {"share_tokens": 16, "shared_tokens": 2 * PAGE, "tile": 16}
    made = DecodeLayout(sequences, heads, key_heads, 16, PAGE, CPU, 256, **small | sizes)
    for value in vars(made).values():
        if isinstance(value, Tensor):
            value.fill_(float("nan") if value.is_floating_point() else -77)
    return made


def attend(
    made: DecodeLayout, given: Batch, dtype: torch.dtype = torch.float32, *, updates: bool = True
) -> tuple[Tensor, Tensor]:
    """What the kernels compute, and plain attention in float64: [N, heads, dim]. Not ``updates``: of a further layer. Tokens of the
    cache that no sequence counts are NaN."""
    n, blocks = len(given.lengths), int(given.table.max()) + 1
    cache = torch.full((blocks, PAGE, made.key_heads, 32), float("nan"))
    for row, length in zip(given.table.long(), given.lengths.tolist(), strict=True):
        at = torch.arange(length)
        cache[row[at // PAGE], at % PAGE] = torch.randn(length, made.key_heads, 32)
    keys, values = cache.to(dtype).split(16, dim=-1)
    q = torch.randn(n, made.heads, 16).to(dtype)
    out = torch.full_like(q, float("nan"))
    if updates:
        made.update(*given)
    made.attend(q, keys, values, out, 16**-0.5)
    return out.double(), exact(q, keys, values, given, list(range(n)))


def steps(made: DecodeLayout) -> tuple[Tensor, Tensor]:
    """Those of shared tokens, and those of own ones: sequence, tokens from there on in the stretch, run, steps left in the run."""
    return made.steps[0, : int(made.shares[0])], made.steps[1, : int(made.shares[2])]


def tokens_read(made: DecodeLayout) -> int:
    return sum(int(part[:, 1].clamp(max=made.block).sum()) for part in steps(made))


CASES = {
    "groups of several sizes": batch([(41, [3, 9, 1]), (30, [5, 5, 5, 5, 5]), (18, [7, 2])], PAGE),
    "one is alone, one has nothing to share": batch([(50, [4]), (3, [1, 2]), (40, [6, 1])], PAGE),
    "more members than a tile has rows for": batch([(20, [2] * 11)], PAGE),
    "a group that lost members, and padding": batch([(33, [30, 1]), (64, [12])], PAGE, pad=3),
    "prompts that end with a block": batch([(32, [1, 4, 5]), (16, [1, 1])], PAGE),
    "members apart from each other": batch([(41, [3, 9, 1]), (30, [5, 5]), (18, [7, 2])], PAGE, mixed=True),
    "a system prompt before the prompts": batch([(61, [3, 9, 1]), (50, [5, 5]), (58, [7, 2])], PAGE, system=24),
    "one token": batch([(1, [0])], PAGE),
    "a long prompt and a long completion": batch([(130, [30, 1]), (9, [100])], PAGE),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_each_sequence_alone(name: str) -> None:
    torch.manual_seed(0)
    made = layout(len(CASES[name].lengths) + 2)
    out, truth = attend(made, CASES[name])
    torch.testing.assert_close(out, truth, atol=1e-5, rtol=0)
    for kind, (part, share) in enumerate(zip(steps(made), made.shares[1::2].tolist(), strict=True)):
        assert (part[:, 1] > 0).all(), "no step is empty"
        assert len(part) <= made.splits * share
        ends = part[part[:, 3] == 1].tolist()
        sizes = [1 if kind else int(made.members[first]) for first, *_ in ends]
        rows = [run + i for (_, _, run, _), size in zip(ends, sizes, strict=True) for i in range(size)]
        assert len(set(rows)) == len(rows) and max(rows, default=0) < len((made.shared_out, made.own_out)[kind]), (
            "a sequence has a row of its own in each of its runs"
        )


def test_each_layer_of_a_step_is_computed() -> None:
    """One update serves all layers."""
    torch.manual_seed(0)
    given = batch([(41, [3, 9, 1]), (30, [5, 5])], PAGE)
    made = layout(5)
    for updates in (True, False, False, True):
        out, truth = attend(made, given, updates=updates)
        torch.testing.assert_close(out, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", [(3, 3), (7, 1), (20, 1)], ids=str)
def test_any_number_of_query_heads_a_key_head(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    out, truth = attend(layout(8, *heads, tile=64), batch([(21, [3, 9, 1]), (18, [5, 2])], PAGE, pad=1))
    torch.testing.assert_close(out, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_random_batches(seed: int) -> None:
    rnd = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [rnd.choice([1, 1, 2, 3, 5, 9]) for _ in range(rnd.randint(1, 4))]
    groups = [(rnd.randint(1, 60), [rnd.randint(0, 30) for _ in range(size)]) for size in sizes]
    given = batch(groups, PAGE, system=rnd.choice([0, 12]), pad=rnd.randint(0, 3), seed=seed, mixed=seed % 2 == 0)
    out, truth = attend(layout(len(given.lengths) + rnd.randint(0, 3)), given)
    torch.testing.assert_close(out, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("system", "mixed"), [(0, False), (0, True), (4, True), (16, False), (36, False), (36, True), (80, True)]
)
def test_a_groups_prompt_is_read_once_also_behind_a_shared_system_prompt(system: int, mixed: bool) -> None:
    """4 groups of 4, prompts of 40 blocks: 4 x 160 tokens, and what each member has of its own."""
    given = batch([(161, [3, 9, 1, 2])] * 4, PAGE, system=system, mixed=mixed)
    made = layout(16)
    made.update(*given)
    assert tokens_read(made) == 4 * 160 + int(given.lengths.sum()) - 16 * 160


def test_a_group_above_the_tiles_rows_is_cut_into_equal_shares() -> None:
    """17 sequences, 8 a tile: 6, 6 and 5."""
    made = layout(17)
    made.update(*batch([(41, [1] * 17)], PAGE))
    assert made.members[made.members > 0].tolist() == [6, 6, 5]
    assert made.shared.tolist() == [40] * 17


def test_a_tile_has_rows_for_the_usual_group() -> None:
    """2 query heads a key head. At least 16 rows, and no more than the largest tile."""
    sizes = {size: layout(8, group_size=size, tile=64).tile for size in (1, 8, 9, 16, 32, 33, 500)}
    assert sizes == {1: 16, 8: 16, 9: 32, 16: 32, 32: 64, 33: 64, 500: 64}


def test_a_short_common_stretch_is_read_by_each() -> None:
    """Of 5 blocks that count, the one group has 4 full ones before the tokens that are computed again, the other 5."""
    made = layout(4, shared_tokens=5 * PAGE)
    made.update(*batch([(20, [3, 9]), (21, [3, 9])], PAGE))
    assert sorted(made.shared.tolist()) == [0, 0, 20, 20]


@pytest.mark.parametrize(("common", "members", "shared"), [(39, [3, 0, 0], 39), (20, [2, 0, 1], 40)])
def test_a_sequence_joins_a_group_if_it_has_almost_as_much_in_common(
    common: int, members: list[int], shared: int
) -> None:
    """Two share 40 blocks, the third has so many in common with them; at most 8 read together."""
    first = list(range(40))
    rows = [[*first, 40, 41], [*first, 42, 43], [*first[:common], *range(50, 92 - common)]]
    made = layout(3)
    made.update(torch.tensor([row[:42] for row in rows]).int(), torch.full((3,), 42 * PAGE).int())
    assert (made.members.tolist(), made.shared[0].item()) == (members, shared * PAGE)


def test_the_block_that_is_being_written_is_never_shared() -> None:
    made = layout(2, shared_tokens=PAGE)
    made.update(torch.arange(3).repeat(2, 1).int(), torch.full((2,), 3 * PAGE).int())
    assert made.shared.tolist() == [2 * PAGE] * 2


def test_a_short_sequence_goes_last_whatever_is_behind_its_last_block() -> None:
    """There it has a block's number that its two neighbours share."""
    table = torch.tensor([[0, 1, 2, 5], [7, 1, 2, 5], [0, 1, 2, 6]]).int()
    made = layout(3)
    made.update(table, torch.tensor([14, 3, 14]).int())
    assert (made.order.tolist(), made.members.tolist()) == ([0, 2, 1], [2, 0, 1])


def test_rows_are_sorted_by_their_full_blocks() -> None:
    """Whatever stands behind them. One that ends comes behind those that go on, and a padded one last."""
    table = torch.tensor([[4, 1, 2, 5], [4, 1, 2, 5], [0, 3, 2, 6], [9, 1, 2, 5], [4, 0, 8, 7], [4, 1, 3, 5]]).int()
    made = layout(6)
    made.update(table, torch.tensor([16, 12, 16, 0, 16, 16]).int())
    assert made.order.tolist() == [2, 4, 0, 5, 1, 3] and made.common.tolist() == [0, 0, 1, 2, 2, 0]


def test_blocks_that_vllm_computed_twice_cost_time_only() -> None:
    """0 and 7 hold the same tokens, 15 and 9 too, so rows share the blocks behind them."""
    torch.manual_seed(0)
    stretch = list(range(10, 18))
    rows = [
        [first, *stretch[:5], other, *stretch[6:], 20 + i]
        for i, (first, other) in enumerate([(0, 15), (7, 15), (0, 9), (7, 9)] * 2)
    ]
    out, truth = attend(made := layout(8), Batch(torch.tensor(rows).int(), torch.full((8,), 10 * PAGE - 1).int()))
    assert sorted(made.order.tolist()) == list(range(8))
    torch.testing.assert_close(out, truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("own", "share", "runs"), [(15, 2, 1), (31, 2, 1), (200, 5, 3), (240, 6, 3)])
def test_all_programs_have_equal_shares_unless_there_is_little_to_read(own: int, share: int, runs: int) -> None:
    """16 tokens a step, 3 programs a key head, 2 steps at least."""
    made = layout(1, share_tokens=32)
    made.update(*batch([(1, [own])], PAGE))
    assert made.shares.tolist() == [0, 2, -(-(own + 1) // 16), share] and made.runs[0, 3] == runs


@pytest.mark.parametrize("part", [None, 0, 1], ids=["large logits", "keys", "values"])
def test_a_sequences_sums_do_not_reach_those_behind_it(part: int | None) -> None:
    """One program reads them one after the other. The third has logits of hundreds, or its last token is NaN in the cache."""
    torch.manual_seed(0)
    given = batch([(41, [3, 9]), (50, [4, 3])], PAGE)
    made = layout(4, share_tokens=1000)
    cache, q = torch.randn(int(given.table.max()) + 1, PAGE, 2, 2, 16), torch.randn(4, 4, 16)
    keys, values = cache[:, :, :, 0], cache[:, :, :, 1]
    last = int(given.lengths[2]) - 1
    if part is None:
        q[2] *= 500
    else:
        cache[given.table[2, last // PAGE], last % PAGE, :, part] = float("nan")
    out = torch.zeros_like(q)
    made.update(*given)
    made.attend(q, keys, values, out, 0.25)
    assert made.shares[3] > made.shares[2] and made.order[3] != 2, "others follow it in its share"
    truth = exact(q, keys, values, given, list(range(4)))
    torch.testing.assert_close(out.double(), truth, atol=1e-4, rtol=0, equal_nan=True)


def test_the_arrays_hold_the_longest_of_all_sequences_and_one_step_more() -> None:
    """With nothing in common. A program loads the numbers of the step behind its last one. Partial sums: a row for each
    sequence, and for each further one of 3 shares a row more, or 8 where that many read together."""
    made = DecodeLayout(3, 4, 2, 16, PAGE, CPU, 37, tile=16)
    made.update(torch.arange(30).view(3, 10).int(), torch.full((3,), 37).int())
    assert made.shares[2] == 3 * 3 and made.steps.shape[1] == made.pages.shape[1] == 3 * 3 + 1
    assert (made.shared_out.shape, made.own_out.shape) == ((3 + 8 * 2, 4, 16), (3 + 2, 4, 16))


def test_a_cache_may_have_more_elements_than_an_int32_counts() -> None:
    """2**31 and more of float16, of which three pieces of memory are touched."""
    torch.manual_seed(0)
    stride, given = 2**20, Batch(torch.tensor([[0, 1, 2048]]).int(), torch.tensor([11]).int())
    cache = torch.empty(2049 * stride, dtype=torch.float16).as_strided((2049, PAGE, 2, 32), (stride, 64, 32, 1))
    cache[[0, 1, 2048]] = torch.randn(3, PAGE, 2, 32).half()
    keys, values = cache.split(16, dim=-1)
    made, q, out = layout(1), torch.randn(1, 4, 16).half(), torch.empty(1, 4, 16).half()
    made.update(*given)
    made.attend(q, keys, values, out, 0.25)
    torch.testing.assert_close(out.double(), exact(q, keys, values, given, [0]), atol=2e-3, rtol=0)


def test_another_batch_in_the_same_arrays() -> None:
    """As a captured graph meets it: same shapes, other groups, lengths and order."""
    torch.manual_seed(0)
    made = layout(8)
    for given in (
        batch([(41, [2] * 8)], PAGE),
        batch([(60, [9]), (33, [1, 20, 5])], PAGE, pad=4),
        batch([(9, [1] * 8)], PAGE, mixed=True),
    ):
        out, truth = attend(made, given)
        torch.testing.assert_close(out, truth, atol=1e-5, rtol=0)


def test_in_half_precision_the_outputs_rounding_is_the_only_error() -> None:
    """float16, as the interpreter has no product of bfloat16. Rounded weights, as flash attention has, would add half of it."""
    torch.manual_seed(0)
    out, truth = attend(layout(4), batch([(121, [30] * 4)], PAGE), torch.float16)
    assert (out - truth).norm() < 1.02 * (truth.half().double() - truth).norm()


def test_the_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    """Without spilled registers, and so that two programs fit its 227 KiB of shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)
    assert {name: found["stack"] for name, found in usage.items()} == dict.fromkeys(usage, 0)
    parts = [usage[f"parts {tile}"]["shared"] for tile in (16, 32, 64)]
    assert len(usage) == 8 and min(parts) > 0 and max(parts) <= 227 * 1024 // 2


def config(mode: str = "auto", group_size: int = 8, prompt: int = 4096, completion: int = 1024) -> Config:
    made = Config()
    made.rollout.shared_decode, made.rollout.group_size = mode, group_size  # type: ignore[assignment]
    made.data.max_prompt_tokens, made.rollout.max_completion_tokens = prompt, completion
    return made


@pytest.mark.parametrize(
    ("group_size", "prompt", "completion", "wanted"),
    [(8, 4096, 1024, True), (8, 512, 512, True), (2, 4096, 1024, False), (8, 300, 64, False), (8, 1024, 4096, False)],
)
def test_auto_takes_it_where_it_was_measured_to_pay(group_size, prompt, completion, wanted) -> None:
    reason = shared_decode.not_wanted(config("auto", group_size, prompt, completion), "cuda")
    assert (reason is None) == wanted, reason
    assert shared_decode.not_wanted(config("always", group_size, prompt, completion), "cuda") is None
    assert shared_decode.not_wanted(config("never", group_size, prompt, completion), "cuda") is not None


def test_tokens_read_less() -> None:
    """8 completions of a prompt of 4,096, 512 tokens into their 1,024: 36,864 tokens, or 4,096 and 8 times 512."""
    assert shared_decode.read_less(8, 4096, 1024) == 8 * 4608 / (4096 + 8 * 512)


def test_always_where_it_cannot_run_is_refused_and_auto_says_why(monkeypatch, caplog) -> None:
    monkeypatch.setattr(vllm_start, "package", lambda: SimpleNamespace(__version__="0.27.0"))
    gpu = torch.device("cuda", 0)
    always = config("always")
    always.rollout.allow_untested_vllm = True
    with pytest.raises(
        ConfigError, match=r"rollout\.shared_decode: always, but it knows vLLM 0\.26, .*, and this is 0\.27\.0"
    ):
        vllm_start.check_version(always, gpu)
    caplog.set_level(logging.INFO)
    plainly = "each completion reads its prompt for itself: "
    knows = f"it knows vLLM {', '.join(shared_decode.KNOWN)}, and this is 0.27.0"
    assert vllm_start._shared_backend(config(), "cuda") == (None, plainly + knows)
    assert knows in caplog.text
    assert shared_decode.cannot(config("always"), "cuda", "0.26.0") is None
    assert shared_decode.cannot(config("always"), "cpu", "0.26.0") == "it needs a GPU"
    monkeypatch.setattr(shared_decode, "RAN", ())
    assert shared_decode.cannot(config(), "cuda", "0.26.0") == (
        "it has not run on a GPU with vLLM 0.26.0 yet; rollout.shared_decode=always tries it"
    )
    monkeypatch.setattr(shared_decode, "RAN", ("0.26",))
    assert shared_decode.cannot(config(), "cuda", "0.26.0") is None
    assert vllm_start._shared_backend(config(), "cpu") == (None, f"{plainly}it needs a GPU")
    backend, said = vllm_start._shared_backend(config(group_size=2), "cuda")
    assert backend is None and "a step would read 1.8 times fewer keys (rollout.group_size 2" in said


def test_layers_that_the_kernels_cannot_compute_are_named() -> None:
    layer = SimpleNamespace(
        attn_type="decoder", head_size=128, num_heads=32, num_kv_heads=8, kv_cache_dtype="auto", sliding_window=(-1, -1),
        sinks=None, logits_soft_cap=0, alibi_slopes=None, kv_sharing_target_layer_name=None,
    )  # fmt: skip
    assert shared_decode.why_not_layer(layer) is None
    for key, value, reason in (
        ("head_size", 96, "head dim 96 is not 64 or 128"),
        ("num_heads", 512, "64 query heads share a key head, more than 32"),
        ("kv_cache_dtype", "fp8", "the cache is fp8"),
        ("sliding_window", (127, 0), "a layer has a sliding window"),
        ("sinks", torch.zeros(32), "a layer has attention sinks"),
        ("logits_soft_cap", 30.0, "a layer caps its logits"),
        ("attn_type", "encoder_only", "attention is of the type encoder_only"),
    ):
        assert shared_decode.why_not_layer(SimpleNamespace(**vars(layer) | {key: value})) == reason
