"""Batches of other sizes call kernels of a GPU that are compiled already."""

import importlib.util
import random
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.kernels import flash
from pgrpo.attention.kernels.segments import Scores, Segments
from pgrpo.attention.layout import PackedLayout, unpack_calls
from pgrpo.config import load_config
from pgrpo.model.policy import load_hf_config
from pgrpo.packing.forest import Forest
from pgrpo.planning.dims import ModelDims
from pgrpo.training import compile_ahead

HEADS, KV_HEADS, DIM = 9, 3, 64
H100 = AttentionChoice("flash4", HEADS, KV_HEADS, DIM, "auto", flops_per_ns=30 * 430e3)


@pytest.fixture
def flash4_keys(monkeypatch):
    """Keys by which flash-attn-4 4.0.0b36 compiles for Hopper and head dim 64, of all calls of a layout."""
    found = set()

    def key(direction, q, *, causal, window_size_left, cu_seqlens_q, max_seqlen_q, max_seqlen_k, **_):
        short = max_seqlen_q * (HEADS // KV_HEADS) <= 192, False
        if direction == "backward":
            short = max_seqlen_q <= 128, max_seqlen_k <= 128
        found.add((direction, causal, window_size_left is not None, len(cu_seqlens_q) - 1 > 256, *short))

    def forward(q, k, v, **options):
        key("forward", q, **options)
        return torch.empty_like(q), q.new_empty(q.shape[1], len(q)), None, None, None

    def backward(q, k, v, *others, **options):
        key("backward", q, **options)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    monkeypatch.setattr(flash, "_flash4", lambda: SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def of(forest):
        found.clear()
        passes = PackedLayout(forest.lengths, forest.parents, choice=H100).passes(None)
        for call in unpack_calls(passes.table):
            q, k = (torch.empty(n, h, DIM, device="meta") for n, h in ((call.q_end - call.q_start, 9), (9, 3)))
            segments, scores = call.on(passes.cu_seqlens), Scores(0.125, bool(call.causal), call.window)
            out, lse = flash.varlen_forward(q, k, k, segments, scores, "flash4")
            flash.varlen_backward(out, q, k, k, out, lse, segments, scores, "flash4")
        return set(found)

    return of


def conversations(rnd, groups, variants):
    """119 tokens of a system prompt, then groups of 8 episodes of up to six turns: each turn is one of so many, of 3 tokens and a
    reply of 12."""
    prompts, sampled = [], []
    for group in range(groups):
        prompts.append([*range(119), 200 + group, 7, 8, 9])
        turns = [[300 + rnd.randrange(variants) for _ in range(rnd.randint(1, 6))] for _ in range(8)]
        sampled.append([[token for turn in episode for token in [turn] * 3 + [5] * 12] for episode in turns])
    return Forest.of(tokens_as_samples(prompts, sampled))


def test_a_run_calls_no_kernel_of_flash4_that_was_not_compiled_ahead(tiny_model, monkeypatch, flash4_keys):
    """Of a game whose turns become more and more alike: 320 segments, and in the end 40; one group alone; groups without turns."""
    keys = [
        f"model.path={tiny_model}", "train.token_budget=32768", "data.max_prompt_tokens=256", "rollout.group_size=8",
        "rollout.max_completion_tokens=192", "rollout.prompts_per_step=32",
    ]  # fmt: skip
    config = load_config("quickstart.yaml", keys)
    monkeypatch.setattr(compile_ahead, "attention_choice", lambda *_: H100)
    dims = ModelDims.from_config(load_hf_config(config.model))
    batches = compile_ahead.unlike_batches(config, dims, torch.device("cpu")).batches
    ahead = set().union(*(flash4_keys(Forest.of(batch.samples(49152))) for batch in batches))
    # Forward and backward: of few segments, of many, and of passes between depths.
    assert len(ahead) == 6 and len(batches) == 3
    rnd, segments, called = random.Random(0), [], set()
    for groups, variants in ((32, 99), (32, 20), (32, 4), (32, 2), (32, 1), (1, 99), (1, 1), (9, 3)):
        forest = conversations(rnd, groups, variants)
        segments.append(len(forest.lengths))
        called |= flash4_keys(forest)
    assert max(segments) > 256 > 40 > min(segments) and len(called) == 4
    short = Forest.of(tokens_as_samples([[n] for n in range(5)], [[[n, 1], [n, 2, 2]] for n in range(5)]))
    assert called | flash4_keys(short) <= ahead


@pytest.mark.parametrize(
    ("major", "told"), [(9, [(256, 300), (700, 256), (256, 256)]), (10, [(5, 300), (700, 9), (5, 9)])]
)
def test_flash4_is_told_bounds_of_segments_that_hold(major, told, monkeypatch):
    """Of a tile and more on Hopper; as they are on Blackwell, where short segments have kernels of their own."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    cu = torch.zeros(2, dtype=torch.int32)
    calls = [
        flash._flash4_segments(Segments(cu, cu, *longest), torch.device("cuda"))
        for longest in ((5, 300), (700, 9), (5, 9))
    ]
    assert [(call["max_seqlen_q"], call["max_seqlen_k"]) for call in calls] == told


def test_what_is_compiled_ahead_is_what_a_run_may_call(tiny_model, monkeypatch):
    """Passes between depths where prompts are long, copies where they are short, and no second variant where one group fits."""
    monkeypatch.setattr(
        compile_ahead,
        "attention_choice",
        lambda *_: AttentionChoice("flash4", 32, 8, 128, "auto", flops_per_ns=36 * 430e3),
    )

    def kernels(prompt, completion, prompts, budget):
        keys = [
            f"model.path={tiny_model}", f"train.token_budget={budget}", f"data.max_prompt_tokens={prompt}",
            "rollout.group_size=8", f"rollout.max_completion_tokens={completion}", f"rollout.prompts_per_step={prompts}",
        ]  # fmt: skip
        config = load_config("quickstart.yaml", keys)
        dims = ModelDims.from_config(load_hf_config(config.model))
        return compile_ahead.unlike_batches(config, dims, torch.device("cpu"))

    causal, many, between, copies = (True, False, False), (True, False, True), (False, False, False), (True,)
    assert kernels(4096, 1024, 32, 12288).kernels == sorted([causal, between, copies])
    assert kernels(64, 512, 4, 32768).kernels == sorted([causal, copies])
    found = kernels(64, 512, 64, 2**20)
    assert found.kernels == sorted([causal, many, copies]) and [batch.groups for batch in found.batches] == [1, 32]


@pytest.fixture
def variants(monkeypatch):
    """``variants(path)``: a module of Triton kernels, and a set to which each launch adds what it would be compiled for."""
    backend, found = make_backend(GPUTarget("cuda", 90, 32)), set()

    def run(kernel, *args, grid, warmup, **options):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        found.add((kernel.__name__, str(bind(*args, **options)[1])))

    monkeypatch.setattr(JITFunction, "run", run)

    def load(path):
        spec = importlib.util.spec_from_file_location(
            "kernels_for_a_gpu", flash.__file__.replace("attention/kernels/flash", path)
        )
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        with monkeypatch.context() as patch:
            patch.delenv("TRITON_INTERPRET", raising=False)
            spec.loader.exec_module(module)
        return module, found

    return load


ROWS = (32, 33, 34, 35, 1, 64, 100)


def test_attentions_triton_kernels_have_one_variant(variants):
    merge, found = variants("attention/kernels/triton_merge")
    for rows in ROWS:
        first = rows % 7
        out, out_p = torch.empty(2, rows + first, HEADS, DIM, dtype=torch.bfloat16)
        lse, lse_p = torch.empty(HEADS, rows + first), torch.empty(HEADS, rows)
        merge.merge_(out[first:], lse[:, first:], out_p[:rows].clone(), lse_p)
        k = torch.empty(99, KV_HEADS, DIM, dtype=torch.bfloat16)
        copies = merge.copy_rows(k, k, torch.zeros(rows, dtype=torch.int64))
        order, offsets = torch.zeros(rows, dtype=torch.int32), torch.zeros(100, dtype=torch.int32)
        merge.sum_copies(*copies, order, order, offsets)
    assert sorted(name for name, _ in found) == ["_copy_rows_kernel", "_merge_kernel", "_sum_copies_kernel"]


def test_the_log_probs_triton_kernels_have_one_variant(variants):
    """Of a chunk that begins at any row, with as many rows as there are."""
    logits, found = variants("model/kernels/logits")
    for rows in ROWS:
        first = rows % 7
        x = torch.empty(rows, 4096, dtype=torch.bfloat16)
        targets, numbers = torch.zeros(rows + first, dtype=torch.int64)[first:], torch.zeros(5, rows + first)[:, first:]
        logits.row_statistics(x, targets, 1.0, True)
        logits.kl_statistics(x, x, 1.0, 1.0)
        lse, dlogprobs, entropy, dentropy, kl = numbers
        logits.to_logit_gradient_(x, targets, lse, dlogprobs, 1.0, (entropy, dentropy), (x, 1.0, lse, kl, kl))
    assert sorted(name for name, _ in found) == ["_gradient_kernel", "_kl_kernel", "_statistics_kernel"]
