"""``loss.preset``: the values of section ``loss`` that a paper's method uses.

A method's settings outside of ``loss`` have keys of their own: DAPO's dynamic sampling is ``rollout.resample_limit``. GSPO and
CISPO differ from the others only if a step has several updates (``train.updates_per_step``, ``train.epochs_per_step``).
"""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, Any] = {
    "ratio": "token",
    "objective": "clip",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "aggregate": "token",
    "scale_advantages": "group",
    "mask_overlong": False,
    "kl_coef": 0.0,
    "kl_correction": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeekMath, arXiv 2402.03300, section 4: the only one with a KL term, which needs a reference model.
    # Its KL has k3's own gradient.
    "grpo": {**PLAIN, "aggregate": "sample", "kl_coef": 0.04, "kl_correction": False},
    # arXiv 2503.20783, section 3.2: no division by sample length or group standard deviation.
    "dr_grpo": {**PLAIN, "aggregate": "constant", "scale_advantages": "none"},
    # arXiv 2503.14476, section 3: clip-higher, token-level loss, overlong filtering.
    "dapo": {**PLAIN, "clip_high": 0.28, "mask_overlong": True},
    # arXiv 2507.18071, section 5.1: a sequence's ratio stays close to 1, so the clip range is narrow.
    "gspo": {**PLAIN, "ratio": "sequence", "aggregate": "sample", "clip_low": 3e-4, "clip_high": 4e-4},
    # MiniMax-M1, arXiv 2506.13585, section 3: no lower clip. The paper gives no upper clip; a ratio of 5 is from ScaleRL
    # (arXiv 2510.13786).
    "cispo": {**PLAIN, "objective": "cispo", "clip_low": 1.0, "clip_high": 4.0},
}
