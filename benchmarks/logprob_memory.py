"""Measures the peak memory of log-probs and entropy with a large vocabulary, forward and backward, and prints the size of the full
logits, which never exist, for comparison.

    python benchmarks/logprob_memory.py [--tokens 8192] [--vocabulary 151936] [--hidden 1024] [--dtype float32]

Memory is what PyTorch allocated on a GPU, and the resident memory of this process on a CPU, in both cases without the inputs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pgrpo.model.logprobs import token_logprobs

GIB = 2**30


def peak_bytes(device: torch.device) -> int:
    """Peak memory since ``reset_peak``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def reset_peak(device: torch.device) -> int:
    """Forget the peak; returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, args.dtype)
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(args.vocabulary, args.hidden, device=device, dtype=dtype).mul_(0.02).requires_grad_()
    targets = torch.randint(args.vocabulary, (args.tokens,), device=device)
    token_logprobs(hidden[:64], weight, targets[:64]).logprobs.sum().backward()  # libraries load now, not below
    hidden.grad = weight.grad = None

    before = reset_peak(device)
    with torch.no_grad():
        token_logprobs(hidden, weight, targets, entropy=True)
    forward = peak_bytes(device) - before
    before = reset_peak(device)
    token_logprobs(hidden, weight, targets, entropy=True).logprobs.sum().backward()
    update = peak_bytes(device) - before
    weights = weight.numel() * weight.element_size()
    print(
        f"{args.tokens} tokens, vocabulary {args.vocabulary}, hidden size {args.hidden}, {args.dtype}, {device.type}\n"
        f"full float32 logits would be {args.tokens * args.vocabulary * 4 / GIB:.2f} GiB\n"
        f"log-probs and entropy:       {forward / GIB:.2f} GiB\n"
        f"with their backward:         {update / GIB:.2f} GiB, the head's gradient ({weights / GIB:.2f} GiB) included"
    )


if __name__ == "__main__":
    main()
