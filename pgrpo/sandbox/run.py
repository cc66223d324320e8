"""Runs one program in the sandbox: no network, no files of this machine, no environment, limits on every resource.

A launcher starts Python in new namespaces, where ``jail.py`` drops all privileges, reports that it is ready, and runs the
program. A failure before that report is a ``SandboxError``, never a fault of the program.

The program shares the kernel with this machine. The sandbox stops what a policy tries by accident or by training, not kernel
exploits; run untrusted people's code in a virtual machine.
"""

from __future__ import annotations

import fcntl
import os
import select
import selectors
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Self

from pgrpo.sandbox.launchers import Launcher, python_files

JAIL = (Path(__file__).parent / "jail.py").read_text()
ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "2", "PATH": ""}
MAX_FILES = 1024  # in the working folder
START_S = 60.0
_PYTHON = ["-S", "-s", "-P", "-B"]  # standard library only; no writing of .pyc

End = Literal["exit", "time", "output"]


class SandboxError(RuntimeError):
    """No sandbox works on this machine, or it could not start. The message gives the reason and the fix."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one program. ``wall_s`` starts at its first line. The kernel enforces the others on its one process."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_mb: int = 512
    """Address space, including about 20 MB of CPython."""
    disk_mb: int = 16
    """Size of its working folder, which is held in memory and deleted afterwards."""
    output_kb: int = 1024
    """Output on stdout and on stderr, each; a program that writes more is killed."""
    threads: int = 32


@dataclass(frozen=True, slots=True)
class Result:
    """``end``: the program exited with ``status`` (128 + N after signal N), or was killed for its time or output."""

    end: End
    status: int
    stdout: str
    stderr: str
    wall_s: float


class Sandbox:
    """Starts programs with one launcher. Thread-safe."""

    def __init__(self, launcher: Launcher) -> None:
        self.name = launcher.name
        self._launcher = launcher

    def run(self, program: str, stdin: str = "", limits: Limits = Limits()) -> Result:
        """Run ``program`` as ``__main__`` to its end. ``SandboxError`` if the sandbox fails."""
        with self.start(program, stdin, limits) as running:
            return running.result()

    def start(self, program: str, stdin: str = "", limits: Limits = Limits(), files: Iterable[int] = ()) -> Running:
        """Start ``program``, which inherits the file descriptors ``files``. ``SandboxError`` if the launcher cannot start."""
        ready, tell = os.pipe()
        with _sealed(program) as program_file, _sealed(stdin) as stdin_file, open(tell, "wb"):
            spec = {
                "program_fd": program_file.fileno(),
                "ready_fd": tell,
                "make_root": self._launcher.make_root,
                "uid": _own_uid(ready),
                "paths": python_files()[0],
                "links": python_files()[1],
                "memory": limits.memory_mb << 20,
                "disk": limits.disk_mb << 20,
                "files": MAX_FILES,
                "threads": limits.threads,
                "cpu": limits.cpu_s,
                "wall": limits.wall_s + START_S,  # only a fallback: this process kills it earlier
            }
            python = [os.path.realpath(sys.executable), *_PYTHON, "-c", f"{JAIL}\nmain({spec!r})"]
            command = [shutil.which(self.name) or self.name, *self._launcher.command(limits.disk_mb << 20), *python]
            try:
                process = subprocess.Popen(
                    command,
                    stdin=stdin_file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=ENVIRONMENT,
                    cwd="/",
                    pass_fds=[program_file.fileno(), tell, *files],
                    start_new_session=True,
                )
            except OSError as error:
                os.close(ready)
                raise SandboxError(f"the sandbox ({self.name}) cannot start: {error}") from error
        return Running(process, ready, limits, self.name)


class Running:
    """A started program. Leaving the ``with`` block kills it."""

    def __init__(self, process: subprocess.Popen[bytes], ready: int, limits: Limits, name: str) -> None:
        self._process, self._ready, self._limits, self._name = process, ready, limits, name
        self._is_ready = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the launcher and all processes that it started (a PID namespace dies with its first process)."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._ready)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def wait_ready(self) -> None:
        """Wait until the program is about to run. ``SandboxError`` if it does not start."""
        if self._is_ready:
            return
        if not select.select([self._ready], [], [], START_S)[0]:
            raise SandboxError(
                f"the sandbox ({self._name}) did not start within {START_S:g} s: the machine is overloaded"
            )
        if os.read(self._ready, 1) == b"":  # end of file: every process of the sandbox has died
            assert self._process.stderr is not None  # Popen got PIPE
            said = self._process.stderr.read().decode("utf-8", "replace").strip().splitlines()
            reason = said[-1] if said else f"status {self._process.wait()}"
            raise SandboxError(f"the sandbox ({self._name}) failed before the program began: {reason}")
        self._is_ready = True

    def result(self) -> Result:
        """Wait for the program, at most ``Limits.wall_s``, and return its result.

        Raises:
            SandboxError: it did not start, or the launcher was killed from outside, for example by the kernel out of memory.
        """
        self.wait_ready()
        begin = time.monotonic()
        end, data = self._collect(begin + self._limits.wall_s, self._limits.output_kb << 10)
        wall_s = time.monotonic() - begin
        if end != "exit":
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self.raise_if_killed()
        status = self._process.wait()
        stdout, stderr = (part.decode("utf-8", "replace") for part in data)
        return Result(end, status, stdout, stderr, wall_s)

    def raise_if_killed(self) -> None:
        """Raise ``SandboxError`` if a signal from outside killed the launcher."""
        status = self._process.poll()
        if status is not None and status < 0:
            raise SandboxError(f"the sandbox ({self._name}) was killed by signal {-status} from outside")

    def _collect(self, deadline: float, limit: int) -> tuple[End, list[bytes]]:
        """Read stdout and stderr until both close, the deadline passes, or one exceeds ``limit`` bytes."""
        data = [bytearray(), bytearray()]
        end: End = "exit"
        with selectors.DefaultSelector() as selector:
            for pipe, received in zip((self._process.stdout, self._process.stderr), data, strict=True):
                assert pipe is not None  # Popen got PIPE
                selector.register(pipe, selectors.EVENT_READ, received)
            while selector.get_map() and end == "exit":
                left = deadline - time.monotonic()
                if left <= 0:
                    end = "time"
                    break
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    key.data.extend(chunk)
                    if len(key.data) > limit:
                        end = "output"
        if end == "exit":
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:  # it closed its pipes but still runs
                end = "time"
        return end, [bytes(received[:limit]) for received in data]


def _sealed(text: str) -> IO[bytes]:
    """Make a read-only file in memory that a child process can inherit."""
    file = os.fdopen(os.memfd_create("pgrpo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    file.write(text.encode("utf-8", "replace"))
    file.seek(0)
    fcntl.fcntl(file, 1033, 0x1 | 0x2 | 0x4 | 0x8)  # F_ADD_SEALS: no more seals, shrinking, growing, writing
    return file


def _own_uid(number: int) -> int | None:
    """As root, return a user id without files, distinct for each running program because the kernel counts threads per user.

    ``number`` distinguishes the running programs of this process. The range is the one that systemd reserves for dynamic users.
    """
    return 61184 + (os.getpid() * 61 + number) % 4096 if os.geteuid() == 0 else None
