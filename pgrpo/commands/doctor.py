"""``pgrpo doctor``: versions, GPUs, and which attention kernels can run here, or why not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console

from pgrpo.attention.kernels.flash import FASTEST_FIRST, choose_kernel, why_not
from pgrpo.planning.flops import GIB, peak_flops
from pgrpo.sandbox.find import find_sandbox
from pgrpo.sandbox.run import SandboxError

PACKAGES = ("pgrpo", "torch", "transformers", "datasets", "omegaconf", "math-verify")
OPTIONAL = {
    "flash-attn-4": "faster attention on Hopper and Blackwell",
    "vllm": "faster sampling",
    "peft": "LoRA",
    "wandb": "tracking",
    "tensorboard": "tracking",
    "reasoning-gym": "procedural tasks",
    "prefix-grouper": "a comparison in benchmarks/policy.py",
}
HEAD_DIMS = (64, 128, 256)


def doctor() -> None:
    """Print what is installed and what can run on each device, in bfloat16 on a GPU."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        console.print(f"{package} {_version(package) or 'MISSING'}")
    for package, use in OPTIONAL.items():
        console.print(f"{package} {_version(package) or f'not installed ({use})'}")
    try:
        console.print(f"sandbox for the reward `code`: {find_sandbox().name}")
    except SandboxError as error:
        console.print(f"sandbox for the reward `code`: none. {error}")
    if not torch.cuda.is_available():
        reason = "this PyTorch is a CPU build" if torch.version.cuda is None else "no device or no driver"
        console.print(f"\nno CUDA GPU ({reason}); everything runs on the CPU, with {torch.get_num_threads()} threads")
        _kernels(console, torch.device("cpu"), torch.float32)
        return
    console.print(f"CUDA {torch.version.cuda}")
    for i in range(torch.cuda.device_count()):
        device, properties = torch.device("cuda", i), torch.cuda.get_device_properties(i)
        peak = peak_flops(properties.name)
        console.print(
            f"\ncuda:{i} {properties.name}, {properties.total_memory / GIB:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}, bfloat16 "
            + (f"{peak / 1e12:.0f} TFLOP/s by its data sheet" if peak else "rate unknown: no perf/mfu in the metrics")
        )
        _kernels(console, device, torch.bfloat16)


def _kernels(console: Console, device: torch.device, dtype: torch.dtype) -> None:
    for head_dim in HEAD_DIMS:
        for name in FASTEST_FIRST:
            why = why_not(name, device, dtype, head_dim)
            console.print(f"  head dim {head_dim}: {name} " + (f"cannot run: {why}" if why else "can run"))
        try:
            console.print(f"  head dim {head_dim}: auto takes {choose_kernel('auto', device, dtype, head_dim).name}")
        except ValueError:
            console.print(f"  head dim {head_dim}: no kernel can run")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
