"""Decoding that reads a group's prompt once, beside plain decoding. Needs a GPU, and vLLM.

    python benchmarks/shared_decode.py kernels [--json FILE]
    python benchmarks/shared_decode.py engine --shape-of benchmarks/qwen3_4b [--prompts 32] [--prompt 4096] [--completion 256]
        [--group-size 8] [--json FILE]

``kernels``: one layer's attention by FlashAttention 3 as vLLM calls it, by the same over prompts once, and by pgrpo's kernels, in
milliseconds and errors. ``engine``: vLLM with and without: milliseconds of a decode step and of its parts, and how far log-probs of
sampled tokens are from a prefill's, and from the policy's in bfloat16 and float32.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHAPES = (
    (32, 8, 4096, 512),
    (16, 16, 4096, 512),
    (32, 8, 1024, 512),
    (64, 8, 512, 256),
    (64, 4, 2048, 256),
    (8, 8, 16384, 1024),
)
"""Groups, completions of each, prompt tokens, tokens of each completion so far."""
HEADS, KEY_HEADS, DIM = 32, 8, 128
CALLS = 8
"""Of a layer's attention in the CUDA graph that is timed."""


PROFILED, FIRST_STEPS = 16, 24
"""Decode steps that are traced; the first steps, whose times are shown one by one."""
PARTS = {
    "attention": r"flash|_kernel_mha|parts_kernel|merge_kernel|(ranks|common|groups|steps)_kernel|reshape_and_cache|even",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|cublas",
    "sampling": r"sort|topk|softmax|argmax|exponential|distribution|gather|scatter|cumsum|scan|logprob|rank|reduce_kernel",
    "copies": r"memcpy|memset",
}
"""Kernels by name; the first that fits."""


class Batch(NamedTuple):
    """[N, blocks] int32; int32 tokens of each sequence, 0 of padded ones."""

    table: Tensor
    lengths: Tensor


def batch(
    groups: list[tuple[int, list[int]]], page: int, *, system: int = 0, pad: int = 0, seed: int = 0, mixed: bool = False
) -> Batch:
    """Groups of (prompt tokens, tokens of each member behind it), whose first ``system`` tokens all share: as vLLM's prefix cache
    gives blocks out, with shuffled numbers, and numbers of earlier requests behind each row's last. ``mixed``: members are not
    neighbours."""
    count, rows, lengths = system // page, [], []
    first = list(range(count))
    for prompt, owns in groups:
        full = (prompt - 1) // page  # the last prompt token is always computed again
        common = first[:full] + list(range(count, count + max(0, full - len(first))))
        count += max(0, full - len(first))
        for own in owns:
            blocks = -(-(prompt + own) // page)
            rows.append(common + list(range(count, count + blocks - full)))
            count += blocks - full
            lengths.append(prompt + own)
    if mixed:
        places = random.Random(seed).sample(range(len(rows)), len(rows))
        rows, lengths = [rows[i] for i in places], [lengths[i] for i in places]
    names = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).int()
    table = torch.full((len(rows) + pad, max(map(len, rows)) + 2), int(names[-1]), dtype=torch.int32)
    for row, blocks in zip(table, rows, strict=False):
        row[: len(blocks)] = names[torch.tensor(blocks)]
    return Batch(table, torch.tensor(lengths + [0] * pad, dtype=torch.int32))


def exact(q_NHD: Tensor, keys: Tensor, values: Tensor, given: Batch, rows: list[int]) -> Tensor:
    """Attention of these rows in float64, each on its own; zeros for padded ones. Keys and values [blocks, page, K, D]."""
    out = torch.zeros(len(rows), *q_NHD.shape[1:], dtype=torch.float64, device=q_NHD.device)
    for i, row in enumerate(rows):
        length = int(given.lengths[row])
        at = given.table[row, : -(-length // keys.shape[1])].long()
        ratio = q_NHD.shape[1] // keys.shape[2]
        k, v = (x[at].flatten(0, 1)[:length].double().repeat_interleave(ratio, 1) for x in (keys, values))
        weights = (torch.einsum("hd,nhd->hn", q_NHD[row].double(), k) * q_NHD.shape[-1] ** -0.5).softmax(-1)
        out[i] = torch.einsum("hn,nhd->hd", weights, v)
    return out


def milliseconds(call: Callable[[], Any]) -> float:
    """Of one call, in a CUDA graph of several: without gaps between launches, as in a model's graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / CALLS)
    return statistics.median(times[1:])


def kernel_row(groups: int, size: int, prompt: int, own: int, page: int = 16) -> dict[str, Any]:
    """Milliseconds of each way, and its error: the norm of the difference from float64 over the norm."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    from pgrpo.attention.merge import merge_
    from pgrpo.rollout.vllm.shared_layout import DecodeLayout

    torch.manual_seed(0)
    n, scale = groups * size, DIM**-0.5
    given = Batch(*(x.cuda() for x in batch([(prompt, [own] * size)] * groups, page)))
    blocks = int(given.table.max()) + 1
    cache = torch.randn(blocks, page, KEY_HEADS, 2 * DIM, device="cuda", dtype=torch.bfloat16)
    keys, values = cache.split(DIM, dim=-1)
    q = 2 * torch.randn(n, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    full = (prompt - 1) // page

    def flash(
        q_QHD: Tensor, starts: Tensor, used: Tensor, table: Tensor, queries: int, causal: bool
    ) -> Callable[[], Any]:
        longest = table.shape[1] * page
        schedule = get_scheduler_metadata(
            batch_size=len(used), max_seqlen_q=queries, max_seqlen_k=longest, num_heads_q=HEADS, num_heads_kv=KEY_HEADS,
            headdim=DIM, cache_seqlens=used, cu_seqlens_q=starts, page_size=page, causal=causal, num_splits=32,
        )  # fmt: skip
        return lambda: flash_attn_varlen_func(
            q_QHD, keys, values, queries, starts, longest, seqused_k=used, softmax_scale=scale, causal=causal, fa_version=3,
            block_table=table, scheduler_metadata=schedule, num_splits=32, return_softmax_lse=True,
        )  # fmt: skip

    plain_call = flash(q, torch.arange(n + 1, device="cuda").int(), given.lengths, given.table, 1, True)
    own_table = given.table[:, full:]
    width = max(full, own_table.shape[1])
    table = torch.zeros(groups + n, width, dtype=torch.int32, device="cuda")
    table[:groups, :full], table[groups:, : own_table.shape[1]] = given.table[::size, :full], own_table
    starts = torch.cat([torch.arange(groups) * size, n + torch.arange(n + 1)]).int().cuda()
    used = torch.cat([given.lengths.new_full((groups,), full * page), given.lengths - full * page])
    both = flash(torch.cat([q, q]), starts, used, table, size, False)

    def once() -> Tensor:
        out, lse = both()[:2]
        merge_(out[n:], lse[:, n:], out[:n], lse[:, :n])
        return out[n:]

    longest, out = int(given.lengths.max()), torch.empty_like(q)
    layout = DecodeLayout(n, HEADS, KEY_HEADS, DIM, page, q.device, longest, group_size=size)

    def shared() -> Tensor:
        layout.attend(q, keys, values, out, scale)
        return out

    layout.update(*given)
    rows = sorted({0, 1, n // 2, n - 1})
    truth = exact(q, keys, values, given, rows)
    row: dict[str, Any] = {"groups": groups, "group_size": size, "prompt": prompt, "completion": own}
    for name, call in {"flash3": lambda: plain_call()[0], "flash3_once": once, "shared": shared}.items():
        error = float((call()[rows].double() - truth).norm() / truth.norm())
        row |= {f"{name}_ms": milliseconds(call), f"{name}_error": error}
    row["layout_ms"] = milliseconds(lambda: layout.update(*given))
    return row


def kernels(args: argparse.Namespace) -> None:
    for shape in SHAPES:
        write(kernel_row(*shape), args)
        torch.cuda.empty_cache()


def engine(args: argparse.Namespace) -> None:
    """A process for each way: an engine in this process would keep its memory, which the policy needs."""
    from full_step import make_model

    if not args.model.exists():
        make_model(args.shape_of, args.model)
    samples = {}
    for way in ("plain", "shared"):  # both before the policy takes memory
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            subprocess.run([sys.executable, *sys.argv, "--way", way, "--sampled", file.name], check=True)
            samples[way] = json.load(file)
    for way, (row, asked, reported) in samples.items():
        for dtype in (torch.bfloat16, torch.float32):
            row |= apart(str(dtype).removeprefix("torch."), reported, policy_logprobs(args, asked, dtype))
        write({"way": way} | row, args)


def one_way(args: argparse.Namespace) -> None:
    """Samples, and leaves in a file: a row, token ids of some samples, and their log-probs as vLLM gave them.

    The row: median milliseconds of a decode step at full batch, and mean |difference| of those log-probs from a prefill's, in nats.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    from vllm import LLM, SamplingParams

    from pgrpo.rollout.vllm import shared_backend
    from pgrpo.rollout.vllm.start import warm_up_this_model_only

    warm_up_this_model_only(torch.device("cuda"))
    limit = args.prompt + args.completion + 1  # scoring them asks for one more
    started = time.perf_counter()
    with shared_backend.registered(args.group_size) if args.way == "shared" else nullcontext():
        llm = LLM(
            str(args.model), dtype="bfloat16", seed=0, max_model_len=limit, max_num_seqs=args.prompts * args.group_size,
            gpu_memory_utilization=0.85, enable_prefix_caching=True, generation_config="vllm", logprobs_mode="raw_logprobs",
            skip_tokenizer_init=True, kernel_config={"enable_flashinfer_autotune": False},
        )  # fmt: skip
    row: dict[str, Any] = {"start_s": time.perf_counter() - started}
    rnd = random.Random(0)
    prompts = [[rnd.randrange(1, 1000) for _ in range(args.prompt)] for _ in range(args.prompts)]
    params = SamplingParams(
        n=args.group_size, max_tokens=args.completion, logprobs=0, ignore_eos=True, detokenize=False, seed=None
    )

    def sample(asked: list[list[int]], sampling: Any) -> tuple[list[Any], list[float]]:
        llm.enqueue([{"prompt_token_ids": p} for p in asked], sampling, use_tqdm=False)
        done, times = [], [time.perf_counter()]
        while llm.llm_engine.has_unfinished_requests():
            done += [output for output in llm.llm_engine.step() if output.finished]
            times.append(time.perf_counter())
        return done, [1e3 * (b - a) for a, b in pairwise(times)]

    sample(prompts[:2], SamplingParams(n=args.group_size, max_tokens=8, ignore_eos=True, detokenize=False))
    llm.reset_prefix_cache()
    outputs, times = sample(prompts, params)
    row["decode_ms"] = statistics.median(times[-args.completion * 3 // 5 :])
    row["first_steps_ms"] = [round(ms, 1) for ms in times[:FIRST_STEPS]]
    if args.profile:
        row |= parts_of_steps(llm, prompts, params)
    row["rollout_tokens_per_s"] = args.prompts * args.group_size * args.completion / sum(times) * 1e3
    print(json.dumps({"way": args.way} | row), flush=True)  # what follows may take too long
    scored = [(output.prompt_token_ids, sampled) for output in outputs[: args.scored] for sampled in output.outputs[:2]]
    asked = [list(prompt) + list(sampled.token_ids) for prompt, sampled in scored]
    reported = [[entry[token].logprob for entry, token in zip(s.logprobs, s.token_ids, strict=True)] for _, s in scored]
    again, _ = sample(asked, SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False))
    again = sorted(again, key=lambda output: int(str(output.request_id).split("-")[0]))
    prefill = [
        [output.prompt_logprobs[i][ids[i]].logprob for i in range(args.prompt, len(ids))]
        for output, ids in zip(again, asked, strict=True)
    ]
    args.sampled.write_text(json.dumps([row | apart("prefill", reported, prefill), asked, reported]))
    llm.llm_engine.engine_core.shutdown()


def parts_of_steps(llm: Any, prompts: list[list[int]], params: Any) -> dict[str, float]:
    """Milliseconds of the first steps, which compute the prompts, and of a decode step at full batch, each by part."""
    llm.reset_prefix_cache()
    ids = llm.enqueue([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    batched = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    first = sum(map(len, prompts)) // batched + 2
    found = {f"prompts_{name}": first * ms for name, ms in traced(llm, first).items()}
    for _ in range(params.max_tokens // 2 - first):
        llm.llm_engine.step()
    found |= {f"profile_{name}": ms for name, ms in traced(llm, PROFILED).items()}
    llm.llm_engine.abort_request(ids, internal=True)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return found


def traced(llm: Any, steps: int) -> dict[str, float]:
    """Mean milliseconds of each of the next steps: the GPU's by kind of kernel, the GPU's idle ones, and those of the thread that
    calls vLLM while it does not wait for the GPU. Prints the slowest kernels."""
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        started = time.perf_counter()
        for _ in range(steps):
            llm.llm_engine.step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - started
    found: dict[str, float] = {"step": 1e3 * wall / steps}
    kernels: dict[str, float] = {}
    spans, waiting = [], 0.0
    for event in trace.events() or ():
        if event.device_type == DeviceType.CUDA:
            kind = next((k for k, names in PARTS.items() if re.search(names, event.name, re.I)), "other kernels")
            found[kind] = found.get(kind, 0.0) + event.time_range.elapsed_us() / 1e3 / steps
            kernels[event.name] = kernels.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3 / steps
            spans.append((event.time_range.start, event.time_range.end))
        elif "Synchronize" in event.name:
            waiting += event.time_range.elapsed_us() / 1e3 / steps
    busy, until = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    found |= {"idle": found["step"] - busy / 1e3 / steps, "vLLM in Python": found["step"] - waiting}
    print(f"{steps} steps of {found['step']:.1f} ms:")
    for name, ms in sorted(kernels.items(), key=lambda item: -item[1])[:20]:
        print(f"{ms:8.3f} ms  {name[:140]}", flush=True)
    return found


def policy_logprobs(args: argparse.Namespace, asked: list[list[int]], dtype: torch.dtype) -> list[list[float]]:
    """Of the tokens behind the prompt, by the untouched transformers model."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model = model.cuda().eval()
    found = []
    with torch.no_grad():
        for ids in asked:
            tokens = torch.tensor([ids], device="cuda")
            logits = model(tokens, logits_to_keep=len(ids) - args.prompt + 1).logits[0, :-1].float()
            found.append(logits.log_softmax(-1).gather(1, tokens[0, args.prompt :, None])[:, 0].tolist())
    return found


def apart(name: str, ours: list[list[float]], theirs: list[list[float]]) -> dict[str, float]:
    differences = [abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return {f"from_{name}": statistics.mean(differences)}


def write(row: dict[str, Any], args: argparse.Namespace) -> None:
    print(json.dumps(row), flush=True)
    if not args.json:
        return
    rows = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
    commit = (
        args.commit
        or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    )
    rows.append({"commit": commit, "command": " ".join(sys.argv)} | row)
    args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kernels", "engine"])
    parser.add_argument("--shape-of", type=Path, default=Path("benchmarks/qwen3_4b"), help="folder with a config.json")
    parser.add_argument(
        "--model", type=Path, default=Path("runs/shared_decode_model"), help="is made where it is missing"
    )
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--completion", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument(
        "--scored", type=int, default=6, help="prompts of which two completions are compared with the policy"
    )
    parser.add_argument(
        "--profile", action="store_true", help="``engine``: also the parts of the first steps and of a decode step"
    )
    parser.add_argument("--commit", help="where there is no git")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows are added to this file")
    parser.add_argument("--way", choices=["plain", "shared"], help=argparse.SUPPRESS)
    parser.add_argument("--sampled", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    {"kernels": kernels, "engine": one_way if args.way else engine}[args.what](args)


if __name__ == "__main__":
    main()
