"""Triton's autotuner tries variants of a kernel one after another, and compiles each where it tries it, on one core. The kernels
of linear attention (fla-core's, and vLLM's own) have about two hundred. Here those of a kernel are compiled together, in threads;
then each is timed as before, alone. So the choice is the same. Triton keeps it in its cache folder, and later runs read it there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MOST_THREADS = 16
CONFIG_DIR, CACHE_MODE = "FLA_CONFIG_DIR", "FLA_CACHE_MODE"
"""Environment variables of fla-core, which it reads when it is imported: a folder with choices, and whether it looks there."""
CHOSEN = Path(__file__).with_name("fla")
"""Choices that are not tuned: of the norms of keys and queries. They move memory, for which any variant of some size will do, and
fla-core tunes their 25 variants for each further 65,536 rows (4,096 tokens of 16 heads), so for batches of other sizes again."""


def use_chosen() -> None:
    """Let fla-core take what is chosen, unless a user has set where it looks."""
    if not os.environ.keys() & {CONFIG_DIR, CACHE_MODE}:
        os.environ[CONFIG_DIR], os.environ[CACHE_MODE] = str(CHOSEN), "full"


def compile_variants_together() -> None:
    """From now on, in this process. Needs Triton; without it there is nothing to compile."""
    if find_spec("triton") is None:
        return
    from triton.runtime.autotuner import Autotuner

    if not hasattr(Autotuner._bench, "alone"):
        Autotuner._bench = _together(Autotuner._bench)


def _together(bench: Callable[..., Any]) -> Callable[..., Any]:
    """``Autotuner._bench``, of which the first call of a round compiles all variants of that round. One that does not compile
    raises its error where it is timed."""

    def first_compiled(tuner: Any, *args: Any, config: Any, **meta: Any) -> Any:
        if not isinstance(tuner.nargs, _Round):  # Triton makes a new dict in each round, and drops it at its end
            tuner.nargs = _Round(tuner.nargs)
            _compile(tuner, args, meta)
        return bench(tuner, *args, config=config, **meta)

    first_compiled.alone = bench  # pyright: ignore[reportFunctionMemberAccess]
    return first_compiled


class _Round(dict[str, Any]):
    """Arguments of a kernel in a round whose variants are compiled. Nothing else may keep them: they are a batch's tensors."""


def _compile(tuner: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    from triton.runtime._async_compile import AsyncCompileMode

    with (
        ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as threads,
        AsyncCompileMode(threads, ignore_errors=True),
    ):
        for config in tuner.prune_configs(meta):
            tuner.fn.run(*args, **meta | config.all_kwargs() | {"warmup": True})
