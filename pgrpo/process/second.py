"""A process beside the run, of the same code, that is to be done before the run needs what it makes. Whatever goes wrong there is
said in one warning, and the run goes on without it."""

from __future__ import annotations

import logging
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

log = logging.getLogger(__name__)
ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b")
"""The beginning of the line behind a traceback."""
BEGIN = """
import sys
sys.path[:] = sys.argv[2:]
import ctypes, os, signal
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
del ctypes, os, signal, sys
"""
"""First code of the second process, whose arguments are the run's process and ``sys.path``. The path is set before any import: else
modules in the current folder come first. The process ends with the run (1 is PR_SET_PDEATHSIG), also if that has ended by now."""


def ahead_codes(cache_dir: str | None) -> tuple[str, str]:
    """Code of the process that compiles the first update, and of the one that compiles vLLM's model."""
    modules = "pgrpo.training.compile_ahead", "pgrpo.rollout.vllm.ahead"
    update, sampler = (f"import {module} as ahead\nahead.main({cache_dir!r})\n" for module in modules)
    return update, sampler


class _Started(NamedTuple):
    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.output.close()
        with suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()


_early: dict[str, _Started] = {}
"""Processes that have begun to import, by their code."""


@contextmanager
def importing_early(codes: Iterable[str]) -> Iterator[None]:
    """Start the processes of these codes before anybody knows which are needed: they import what they need, while the run does so
    too, and wait for ``SecondProcess.begin``. Those that wait are gone at the end of the block, or after ``end_early``."""
    try:
        with suppress(Exception):  # ``begin`` says what prevents it
            for code in codes:
                _early[code] = _start(code)
        yield
    finally:
        end_early()


def end_early() -> None:
    """End the processes that still wait."""
    while _early:
        _early.popitem()[1].end()


def _start(code: str) -> _Started:
    # The keys of PyTorch's caches differ where the main module has an attribute torch.
    code = BEGIN + ("import torch\n" if hasattr(sys.modules["__main__"], "torch") else "") + code
    command = [sys.executable, "-c", code, str(os.getpid()), *sys.path]
    output = tempfile.TemporaryFile()  # noqa: SIM115
    return _Started(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT), output)


def _reason(output: str) -> str:
    """The line that names the last error, whose text may go on behind it, or the last line; empty without any."""
    lines = output.strip().splitlines()
    return next((line for line in reversed(lines) if ERROR.match(line)), lines[-1] if lines else "")


class SecondProcess:
    """One process, at most. It is gone after ``end``.

    Args:
        what: it compiles.
        code: its Python, which finds what ``begin`` is given pickled in standard input.
        instead: what happens in the run if it fails.
    """

    def __init__(self, what: str, code: str, instead: str) -> None:
        self.what, self.code, self.instead = what, code, instead
        self._started: _Started | None = None
        self._done: Path | None = None

    @property
    def is_begun(self) -> bool:
        return self._started is not None

    def begin(self, given: Any, done: Path) -> None:
        """Start it, unless the file ``done`` tells that such a one was done before."""
        self._done = done
        if done.exists():
            return
        pickled = pickle.dumps(given)
        self._started = _early.pop(self.code, None) or _start(self.code)
        pipe = self._started.process.stdin
        assert pipe is not None
        with suppress(BrokenPipeError), pipe:  # it has ended: ``wait`` says why
            pipe.write(pickled)

    def wait(self, seconds: float) -> None:
        """Wait for its end, and end it after so many seconds."""
        if self._started is None:
            return
        process, output = self._started
        started = time.monotonic()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            log.warning(
                "compiling %s ahead was not done %.0f s after the weights were read: %s", self.what, seconds, self.instead,
            )  # fmt: skip
            return
        if code:
            output.seek(0)
            reason = _reason(output.read().decode(errors="replace")) or f"exit code {code}"
            log.warning("compiling %s ahead failed (%s): %s", self.what, reason, self.instead)
            return
        waited = time.monotonic() - started
        log.info("compiled %s beside reading the weights; waited %.0f s for it", self.what, waited)
        self.mark()

    def mark(self) -> None:
        """Its work is done, by itself or by the run: later runs begin none."""
        if self._done is None:
            return
        with suppress(OSError):  # a folder that is read-only costs another such process
            self._done.parent.mkdir(parents=True, exist_ok=True)
            self._done.touch()

    def end(self) -> None:
        if self._started is not None:
            self._started.end()
