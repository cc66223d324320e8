"""The flash kernels behind one pair of functions. Grouped attention needs only a kernel that returns its log-sum-exp (LSE).

- ``builtin``: PyTorch's own, which is FlashAttention-2 on a GPU and ``cpu_flash.py`` on a CPU. Nothing to install.
- ``flash4``: the package flash-attn-4 (Hopper, Blackwell), ``pip install 'pgrpo[flash]'``.

Q query rows, S key rows, H query heads, K key/value heads (H is a multiple of K), D head dim, n sequences of one length.
Log-sum-exps are of the scaled scores, natural logarithm, [H, Q] float32 (float64 for float64 inputs); -inf with output 0 for a
row without keys. Causal masks are aligned at the end: the last query row attends to the last key (bottom-right).
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pgrpo.attention.kernels import cpu_flash
from pgrpo.attention.kernels.segments import Segments

aten = torch.ops.aten
KernelName = Literal["builtin", "flash4"]
FASTEST_FIRST: tuple[KernelName, ...] = ("flash4", "builtin")


class KernelChoice(NamedTuple):
    """A kernel that can run, and why it was chosen."""

    name: KernelName
    reason: str


def choose_kernel(
    wanted: KernelName | Literal["auto"], device: torch.device, dtype: torch.dtype, head_dim: int
) -> KernelChoice:
    """The kernel of that name; for ``auto`` the fastest that can run here.

    Raises:
        ValueError: the kernel cannot run on this device, dtype and head dim; the message says why.
    """
    if wanted != "auto":
        if why := why_not(wanted, device, dtype, head_dim):
            raise ValueError(f"{wanted} cannot run here: {why}")
        return KernelChoice(wanted, "asked for")
    obstacles: dict[KernelName, str | None] = {name: why_not(name, device, dtype, head_dim) for name in FASTEST_FIRST}
    passed_over = "; ".join(f"not {name}: {why}" for name, why in obstacles.items() if why)
    for name in FASTEST_FIRST:
        if not obstacles[name]:
            return KernelChoice(name, passed_over or "the fastest that can run here")
    raise ValueError(f"no attention kernel can run here; {passed_over}")


def why_not(name: KernelName, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a kernel cannot run on this device, dtype and head dim; None if it can."""
    if device.type == "cpu":
        return None if name == "builtin" else "it needs a CUDA GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    if name == "flash4":
        if major not in (9, 10, 11):
            return f"compute capability {major}.{minor} is neither Hopper nor Blackwell of a data centre (9.x to 11.x)"
        if head_dim > 128 or head_dim % 8:
            return f"head dim {head_dim} is not a multiple of 8 up to 128"
        return _import_error()
    if major < 8:
        return f"compute capability {major}.{minor} is older than Ampere (8.0)"
    return None if head_dim <= 256 and head_dim % 8 == 0 else f"head dim {head_dim} is not a multiple of 8 up to 256"


def _import_error() -> str | None:
    """Why flash-attn-4 cannot be imported; None if it can, which takes seconds. A damaged package raises all kinds of exceptions,
    some when it is only looked for."""
    try:
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            return "the package flash-attn-4 is not installed (pip install 'pgrpo[flash]')"
        _flash4()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fix = "pip install 'pgrpo[flash]' has versions that fit each other"
        return f"flash-attn-4 is installed but cannot be imported ({reason}): {fix}"
    return None


@cache
def _flash4() -> Any:
    # The compiler of flash-attn-4 warns for each kernel, at length, that the unused argument aux_data has no value.
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted", category=UserWarning)
    return importlib.import_module("flash_attn.cute.interface")


def varlen_forward(
    q_QHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, seg: Segments, causal: bool, scale: float, kernel: str = "builtin"
) -> tuple[Tensor, Tensor]:
    """Attention of each query segment to its key segment: output [Q, H, D] and LSE [H, Q]."""
    if q_QHD.device.type == "cpu":
        return cpu_flash.forward(q_QHD, k_SKD, v_SKD, seg, causal, scale)
    if kernel == "flash4":
        out_QHD, lse_HQ, *_ = _flash4()._flash_attn_fwd(
            q_QHD, k_SKD, v_SKD, cu_seqlens_q=seg.cu_q, cu_seqlens_k=seg.cu_k, max_seqlen_q=seg.max_q,
            max_seqlen_k=seg.max_k, softmax_scale=scale, causal=causal, return_lse=True,
        )  # fmt: skip
        return out_QHD, lse_HQ
    # With max_q 1 the kernel takes a special path, which reshapes as if no segment were empty.
    max_q = max(seg.max_q, 2)
    out_QHD, lse_HQ, *_ = aten._flash_attention_forward(
        q_QHD, k_SKD, v_SKD, seg.cu_q, seg.cu_k, max_q, seg.max_k, 0.0, causal, False, scale=scale
    )
    return out_QHD, lse_HQ


def varlen_backward(
    dout_QHD: Tensor, q_QHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
    seg: Segments, causal: bool, scale: float, kernel: str = "builtin",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [Q, H, D], dk [S, K, D], dv [S, K, D]. ``out`` and ``lse`` may come from a softmax over more keys than these."""
    if q_QHD.device.type == "cpu":
        return cpu_flash.backward(dout_QHD, q_QHD, k_SKD, v_SKD, out_QHD, lse_HQ, seg, causal, scale)
    if kernel == "flash4":
        dq, dk, dv = _flash4()._flash_attn_bwd(
            q_QHD, k_SKD, v_SKD, out_QHD, dout_QHD, lse_HQ.contiguous(), softmax_scale=scale, causal=causal,
            cu_seqlens_q=seg.cu_q, cu_seqlens_k=seg.cu_k, max_seqlen_q=seg.max_q, max_seqlen_k=seg.max_k,
        )  # fmt: skip
        return dq, dk, dv
    # Without dropout the flash kernels draw no random numbers and ignore the two rng arguments.
    unused = torch.empty(0, dtype=torch.uint64, device=q_QHD.device)
    dq, dk, dv = aten._flash_attention_backward(
        dout_QHD.contiguous(), q_QHD, k_SKD, v_SKD, out_QHD.contiguous(), lse_HQ.contiguous(),
        seg.cu_q, seg.cu_k, seg.max_q, seg.max_k, 0.0, causal, unused, unused, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


def dense_forward(q_nQHD: Tensor, k_nSKD: Tensor, v_nSKD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of n equal-length sequences, not causal, by the built-in kernel: output [n, Q, H, D] and LSE [n, H, Q]."""
    if q_nQHD.device.type == "cpu":
        out, lse = cpu_flash.dense_forward(
            q_nQHD.transpose(1, 2), k_nSKD.transpose(1, 2), v_nSKD.transpose(1, 2), False, scale
        )
        return out.transpose(1, 2), lse
    out, lse, *_ = aten._flash_attention_forward(
        q_nQHD, k_nSKD, v_nSKD, None, None, q_nQHD.shape[1], k_nSKD.shape[1], 0.0, False, False, scale=scale
    )
    return out, lse
