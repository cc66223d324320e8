"""A process beside the run, of the same code, that is to be done before the run needs what it makes. Whatever goes wrong there is
said in one warning, and the run goes on without it."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)
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


class SecondProcess:
    """One process, at most. It is gone after ``end``.

    Args:
        what: it compiles.
        instead: what happens in the run if it fails.
    """

    def __init__(self, what: str, instead: str) -> None:
        self.what, self.instead = what, instead
        self._process: subprocess.Popen[bytes] | None = None
        self._files = ExitStack()
        self._output: IO[bytes] | None = None
        self._done: Path | None = None

    def begin(self, code: str, given: Any, done: Path) -> None:
        """Start it, unless the file ``done`` tells that such a one was done before.

        Args:
            code: its Python.
            given: an object that it finds pickled in its standard input.
        """
        self._done = done
        if done.exists():
            return
        # The keys of PyTorch's caches differ where the main module has an attribute torch.
        code = BEGIN + ("import torch\n" if hasattr(sys.modules["__main__"], "torch") else "") + code
        self._output = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        with tempfile.TemporaryFile() as file:
            file.write(pickle.dumps(given))
            file.seek(0)
            command = [sys.executable, "-c", code, str(os.getpid()), *sys.path]
            self._process = subprocess.Popen(command, stdin=file, stdout=self._output, stderr=subprocess.STDOUT)

    def wait(self, seconds: float) -> None:
        """Wait for its end, and end it after so many seconds."""
        if self._process is None or self._output is None:
            return
        started = time.monotonic()
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._kill()
            log.warning(
                "compiling %s ahead was not done %.0f s after the weights were read: %s",
                self.what,
                seconds,
                self.instead,
            )
            return
        if code:
            self._output.seek(0)
            last = self._output.read().decode(errors="replace").strip().splitlines()[-1:]
            log.warning("compiling %s ahead failed (%s): %s", self.what, *last or [f"exit code {code}"], self.instead)
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
        self._kill()
        self._files.close()

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
