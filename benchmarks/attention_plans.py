"""Measures both ways of grouped attention over many shapes and fits the constants of ``pgrpo/attention/choose.py``. Needs a GPU.

    python benchmarks/attention_plans.py [--kernel auto] [--heads 32 --kv-heads 8 --head-dim 128] [--json FILE]

Times forward and backward of one layer's attention, median of ten, both ways in turn. Prints each shape, the fitted constants, how
often the fitted model picks the faster way, and how much time its wrong picks cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.grouped import grouped_attention
from pgrpo.attention.kernels.flash import choose_kernel
from pgrpo.attention.layout import PackedLayout

PROMPTS, COMPLETIONS, GROUP_SIZES = (32, 128, 512, 1024, 2048, 4096), (256, 1024, 4096), (4, 16)
MOST_TOKENS = 40_000


def milliseconds(layout: PackedLayout, args: argparse.Namespace) -> float:
    """Median of forward and backward."""
    tokens = layout.nodes[-1].end
    shapes = [(tokens, h, args.head_dim) for h in (args.heads, args.kv_heads, args.kv_heads)]
    q, k, v = (torch.randn(s, device="cuda").bfloat16().requires_grad_() for s in shapes)
    dout, times = torch.randn_like(q), []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.autograd.grad(grouped_attention(q, k, v, layout, args.head_dim**-0.5), (q, k, v), dout)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=["auto", "builtin", "flash4"], default="auto")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    kernel = choose_kernel(args.kernel, torch.device("cuda", 0), torch.bfloat16, args.head_dim).name
    rows = []
    for prompt, completion, size in product(PROMPTS, COMPLETIONS, GROUP_SIZES):
        groups = min(4, MOST_TOKENS // (prompt + size * completion))
        if not groups:
            continue
        forest = (
            [prompt] * groups + [completion] * size * groups,
            [-1] * groups + [i // size for i in range(size * groups)],
        )
        plans: tuple[Literal["between_depths", "copied_keys"], ...] = ("between_depths", "copied_keys")
        two_calls, concat = (
            milliseconds(PackedLayout(*forest, "cuda", AttentionChoice(kernel, way=plan)), args) for plan in plans
        )
        mib = 2 * args.head_dim / 2**20
        queries = groups * size * completion * args.heads * mib
        copied = groups * (prompt + size * (prompt + completion)) * 2 * args.kv_heads * mib
        row = {"prompt": prompt, "completion": completion, "group_size": size, "groups": groups}
        rows.append(row | {"two_calls_ms": two_calls, "concat_ms": concat, "query_mib": queries, "copied_mib": copied})
        print(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()), flush=True)

    difference = np.array([1e6 * (r["two_calls_ms"] - r["concat_ms"]) for r in rows])
    terms = np.array([[1.0, r["query_mib"], -r["copied_mib"]] for r in rows])
    # Relative to the time of the layer: a wrong pick of a short layer costs little.
    scale = np.array([1.0 / (1e6 * r["concat_ms"]) for r in rows])
    constants, *_ = np.linalg.lstsq(terms * scale[:, None], difference * scale, rcond=None)
    picks = terms @ constants > 0  # concat
    lost = [
        (r["concat_ms"] if pick else r["two_calls_ms"]) / min(r["concat_ms"], r["two_calls_ms"])
        for r, pick in zip(rows, picks, strict=True)
    ]
    print(f"{kernel}: PASS_NS={constants[0]:.0f} PASS_NS_PER_MIB={constants[1]:.0f} ", end="")
    print(f"COPY_NS_PER_MIB={constants[2]:.0f}")
    print(
        f"picks the faster plan in {sum(x == 1 for x in lost)} of {len(rows)} shapes, at worst {max(lost):.3f} times it"
    )
    if args.json:
        report = {
            "device": torch.cuda.get_device_name(),
            "kernel": kernel,
            "constants": constants.tolist(),
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
