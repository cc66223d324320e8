"""The flash kernels behind one pair of functions. Grouped attention needs only a kernel that returns its log-sum-exp (LSE).

- ``builtin``: PyTorch's own, which is FlashAttention-2 on a GPU and ``cpu_flash.py`` on a CPU. Nothing to install.
- ``flash4``: the package flash-attn-4 (Hopper, Blackwell), ``pip install -e '.[flash]'``.

Q query rows, S key rows, H query heads, K key/value heads (H is a multiple of K), D head dim of keys, Dv that of values, n
sequences of one length. Log-sum-exps are of the scaled scores, natural logarithm, [H, Q] float32 (float64 for float64 inputs);
-inf (``builtin`` on a GPU: +inf) with output 0 for a row without keys. Causal masks are aligned at the end: the last query row
attends to the last key (bottom-right).
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pgrpo.attention.kernels import cpu_flash
from pgrpo.attention.kernels.segments import Scores, Segments

aten = torch.ops.aten
KernelName = Literal["builtin", "flash4"]
FASTEST_FIRST: tuple[KernelName, ...] = ("flash4", "builtin")
NATIVE_DIMS = ((192, 128),)
"""Head dims of keys and of values, unlike each other, that flash4 takes (DeepSeek's)."""
LONG_SEGMENT = 256
"""flash4 compiles once more where no segment has more rows than one of its tiles, at most 192 (4.0.0b36). On Hopper that changes
nothing in the code of calls with ``cu_seqlens``, and takes seconds in the middle of a run."""
LOOKED_UP_SEGMENTS = 256
"""With more segments flash4 has other kernels, which look up a tile's segment in a table (``BIN_BATCH_SEARCH_THRESH``)."""


class KernelChoice(NamedTuple):
    """A kernel that can run, and why it was chosen."""

    name: KernelName
    reason: str


def choose_kernel(
    wanted: KernelName | Literal["auto"],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
    *,
    softcapped: bool = False,
) -> KernelChoice:
    """The kernel of that name; for ``auto`` the fastest that can run here.

    Args:
        head_dim: of queries and keys; ``value_dim`` of values, if it is another.
        softcapped: whether scores are soft-capped.

    Raises:
        ValueError: the kernel cannot run on this device, dtype and heads; the message says why.
    """
    model = device, dtype, head_dim, value_dim or head_dim, softcapped
    if wanted != "auto":
        if why := why_not(wanted, *model):
            raise ValueError(f"{wanted} cannot run here: {why}")
        return KernelChoice(wanted, "asked for")
    obstacles: dict[KernelName, str | None] = {name: why_not(name, *model) for name in FASTEST_FIRST}
    passed_over = "; ".join(f"not {name}: {why}" for name, why in obstacles.items() if why)
    for name in FASTEST_FIRST:
        if not obstacles[name]:
            return KernelChoice(name, passed_over or "the fastest that can run here")
    raise ValueError(f"no attention kernel can run here; {passed_over}")


def why_not(
    name: KernelName,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int | None = None,
    softcapped: bool = False,
) -> str | None:
    """Why a kernel cannot run (``choose_kernel`` has the arguments); None if it can."""
    if device.type == "cpu":
        return None if name == "builtin" else "it needs a CUDA GPU"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(device)
    dims = head_dim, value_dim or head_dim
    wide = max(dims)
    if name == "flash4":
        if major not in (9, 10, 11):
            return f"compute capability {major}.{minor} is neither Hopper nor Blackwell of a data centre (9.x to 11.x)"
        if wide % 8 or wide > 256 or (major > 9 and 128 < wide < 256 and dims not in NATIVE_DIMS):
            return f"head dim {wide} is not a multiple of 8 up to {'256' if major == 9 else '128, or 256'}"
        return _import_error()
    if major < 8:
        return f"compute capability {major}.{minor} is older than Ampere (8.0)"
    if softcapped:
        return "it cannot soft-cap scores"
    return None if wide <= 256 and wide % 8 == 0 else f"head dim {wide} is not a multiple of 8 up to 256"


def _import_error() -> str | None:
    """Why flash-attn-4 cannot be imported; None if it can, which takes seconds. A damaged package raises all kinds of exceptions,
    some when it is only looked for."""
    try:
        if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
            return "the package flash-attn-4 is not installed (pip install -e '.[flash]')"
        _flash4()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        fix = "pip install -e '.[flash]' has versions that fit each other"
        return f"flash-attn-4 is installed but cannot be imported ({reason}): {fix}"
    return None


@cache
def _flash4() -> Any:
    # The compiler of flash-attn-4 warns for each kernel, at length, that the unused argument aux_data has no value.
    warnings.filterwarnings("ignore", message="Argument aux_data .* cannot be converted", category=UserWarning)
    return importlib.import_module("flash_attn.cute.interface")


def varlen_forward(
    q_QHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, seg: Segments, scores: Scores, kernel: str = "builtin"
) -> tuple[Tensor, Tensor]:
    """Attention of each query segment to its key segment: output [Q, H, Dv] and LSE [H, Q]."""
    if q_QHD.device.type == "cpu":
        return cpu_flash.forward(q_QHD, k_SKD, v_SKD, seg, scores)
    value_dim = v_SKD.shape[-1]
    q_QHD, k_SKD, v_SKD = _equally_wide(kernel, q_QHD, k_SKD, v_SKD)
    if kernel == "flash4":
        out_QHD, lse_HQ, *_ = _flash4()._flash_attn_fwd(
            q_QHD, k_SKD, v_SKD, softmax_scale=scores.scale, causal=scores.causal, softcap=scores.softcap,
            window_size_left=_keys_before(scores), return_lse=True, **_flash4_segments(seg, q_QHD.device),
        )  # fmt: skip
        return out_QHD[..., :value_dim], lse_HQ
    if scores.softcap:
        raise ValueError("PyTorch's own flash kernel cannot soft-cap scores: see choose_kernel")
    # With max_q 1 the kernel takes a special path, which reshapes as if no segment were empty.
    max_q = max(seg.max_q, 2)
    out_QHD, lse_HQ, *_ = aten._flash_attention_forward(
        q_QHD, k_SKD, v_SKD, seg.cu_q, seg.cu_k, max_q, seg.max_k, 0.0, scores.causal, False, scale=scores.scale,
        window_size_left=_keys_before(scores),
    )  # fmt: skip
    return out_QHD[..., :value_dim], lse_HQ


def varlen_backward(
    dout_QHD: Tensor, q_QHD: Tensor, k_SKD: Tensor, v_SKD: Tensor, out_QHD: Tensor, lse_HQ: Tensor,
    seg: Segments, scores: Scores, kernel: str = "builtin",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq [Q, H, D], dk [S, K, D], dv [S, K, Dv]. ``out`` and ``lse`` may come from a softmax over more keys than these."""
    if q_QHD.device.type == "cpu":
        return cpu_flash.backward(dout_QHD, q_QHD, k_SKD, v_SKD, out_QHD, lse_HQ, seg, scores)
    widths = q_QHD.shape[-1], k_SKD.shape[-1], v_SKD.shape[-1]
    q_QHD, k_SKD, v_SKD = _equally_wide(kernel, q_QHD, k_SKD, v_SKD)
    dout_QHD, out_QHD = (_wide(x, v_SKD.shape[-1]) for x in (dout_QHD, out_QHD))
    if kernel == "flash4":
        gradients = _flash4()._flash_attn_bwd(
            q_QHD, k_SKD, v_SKD, out_QHD, dout_QHD, lse_HQ.contiguous(), softmax_scale=scores.scale, causal=scores.causal,
            softcap=scores.softcap, window_size_left=_keys_before(scores), **_flash4_segments(seg, q_QHD.device),
        )  # fmt: skip
    else:
        # Without dropout the flash kernels draw no random numbers and ignore the two rng arguments.
        unused = torch.empty(0, dtype=torch.uint64, device=q_QHD.device)
        gradients = aten._flash_attention_backward(
            dout_QHD.contiguous(), q_QHD, k_SKD, v_SKD, out_QHD.contiguous(), lse_HQ.contiguous(),
            seg.cu_q, seg.cu_k, seg.max_q, seg.max_k, 0.0, scores.causal, unused, unused, scale=scores.scale,
            window_size_left=_keys_before(scores),
        )  # fmt: skip
    dq, dk, dv = (x[..., :width] for x, width in zip(gradients[:3], widths, strict=True))
    return dq, dk, dv


def _flash4_segments(seg: Segments, device: torch.device) -> dict[str, Any]:
    """The segments as arguments of flash4. On Hopper the bounds of their lengths are so large that they never choose a kernel; no
    tensor of such a call has their size. On Blackwell short segments have kernels of their own."""
    least = LONG_SEGMENT if torch.cuda.get_device_capability(device)[0] == 9 else 0
    longest = {"max_seqlen_q": max(seg.max_q, least), "max_seqlen_k": max(seg.max_k, least)}
    return {"cu_seqlens_q": seg.cu_q, "cu_seqlens_k": seg.cu_k, **longest}


def dense_forward(q_nQHD: Tensor, k_nSKD: Tensor, v_nSKD: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attention of n equal-length sequences, not causal, by the built-in kernel: output [n, Q, H, Dv] and LSE [n, H, Q]."""
    if q_nQHD.device.type == "cpu" or scores.softcap:  # soft-capped scores are computed as a matrix, on any device
        q, k, v = (x.transpose(1, 2) for x in (q_nQHD, k_nSKD, v_nSKD))
        out, lse = cpu_flash.dense_forward(q, k, v, scores)
        return out.transpose(1, 2), lse
    value_dim = v_nSKD.shape[-1]
    q_nQHD, k_nSKD, v_nSKD = _equally_wide("builtin", q_nQHD, k_nSKD, v_nSKD)
    out, lse, *_ = aten._flash_attention_forward(
        q_nQHD, k_nSKD, v_nSKD, None, None, q_nQHD.shape[1], k_nSKD.shape[1], 0.0, False, False, scale=scores.scale
    )
    return out[..., :value_dim], lse


def _keys_before(scores: Scores) -> int | None:
    """Keys in front of a query's own that it sees, as the kernels count a window; None for all."""
    return scores.window - 1 if scores.window else None


def _equally_wide(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros behind keys (and queries) or values until both have one head dim, unless the kernel takes them as they are: the zeros
    change neither scores nor the first columns of the output. flash4's backward on Hopper takes unlike dims only where every query
    head has a key head of its own."""
    dims = q.shape[-1], v.shape[-1]
    if dims[0] == dims[1] or (kernel == "flash4" and dims in NATIVE_DIMS and q.shape[-2] == k.shape[-2]):
        return q, k, v
    return _wide(q, max(dims)), _wide(k, max(dims)), _wide(v, max(dims))


def _wide(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))
