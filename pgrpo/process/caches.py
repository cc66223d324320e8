"""One folder for all code that a run compiles with torch.compile, Triton, tilelang, flash-attn-4 and vLLM. Later runs load it."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from pgrpo.process.tuning import compile_variants_together, use_chosen

log = logging.getLogger(__name__)
FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TILELANG_CACHE_DIR": "tilelang",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash_attn",
    "VLLM_CACHE_ROOT": "vllm",
}
"""Environment variables that name a package's cache, and its folder in ours."""
FLASH4 = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
"""Without it flash-attn-4, which reads it when it is imported, compiles its kernels in every process."""

NOEXEC = getattr(os, "ST_NOEXEC", 0)
"""The flag of a file system; only Linux tells it."""

TUNED = "TRITON_CACHE_AUTOTUNING"
"""Without it Triton, which reads it when a kernel is defined, tunes kernels again in every process, but for those that ask for the
same by themselves (fla-core's)."""


def cache_root(folder: str | None) -> Path:
    """``folder``; without it ``pgrpo`` in the user's cache folder (``XDG_CACHE_HOME``, or ``~/.cache``)."""
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pgrpo").expanduser().absolute()


def use_caches(folder: str | None) -> None:
    """Let this process and its children keep compiled code in ``cache_root``, and on a GPU tune Triton's kernels as
    ``tuning.py`` says. Variables that are set already stay as they are, unless it was PyTorch who set them: importing torch._dynamo
    sets inductor's to its default, a temporary folder. If the folder cannot be made or written, or no code can be loaded from it,
    packages use their own, most of them temporary."""
    use_chosen()
    if torch.cuda.is_available():
        compile_variants_together()
    root, variables = cache_root(folder), dict(os.environ)
    if variables.get("TORCHINDUCTOR_CACHE_DIR") == default_cache_dir():
        del variables["TORCHINDUCTOR_CACHE_DIR"]
    ours = {name: root / part for name, part in FOLDERS.items() if name not in variables}
    try:
        for path in ours.values():
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(f"{path} cannot be written")
            if os.statvfs(path).f_flag & NOEXEC:
                raise PermissionError(f"{path} is on a disk that is mounted noexec, from which no code can be loaded")
    except OSError as error:
        text = "cache_dir: %s cannot be used (%s): the next run compiles again; set cache_dir to a folder of your own"
        log.warning(text, root, error)
        return
    os.environ |= {name: str(path) for name, path in ours.items()}
    for name in (FLASH4, TUNED):
        os.environ.setdefault(name, "1")
    # vLLM sets the precision of float32 matrix products to the default, "highest". The keys of PyTorch's caches tell a default that
    # was set from one that was not, and processes without vLLM have the same code.
    if torch.backends.cuda.matmul.fp32_precision == "none":
        torch.set_float32_matmul_precision("highest")


def disk_full(error: Exception, folder: str | None) -> RuntimeError | None:
    """An error of a package that found no room for compiled code, with the folder and its key, as packages name neither; None if
    that is not the reason, or if the error names a file elsewhere."""
    found, root = re.search(rf"\[Errno ({errno.ENOSPC}|{errno.EDQUOT})\].*", str(error)), cache_root(folder)
    if found is None or any(not Path(name).is_relative_to(root) for name in re.findall(r"'(/.*?)'", found[0])):
        return None
    free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
    return RuntimeError(
        f"a disk is full ({found[0].strip()}). Compiled code is kept in {root}, where {free / 2**20:,.0f} MiB are free: make room "
        "there, or set cache_dir to a folder on another disk"
    )


@contextmanager
def keeping_caches() -> Iterator[None]:
    """vLLM points inductor and Triton to folders of its own config when it compiles; take ours back after the block."""
    before = {name: os.environ.get(name) for name in FOLDERS}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
