"""Python processes that start at once: copies (fork) of one process that has imported all that a run needs.

A new process takes five CPU seconds for these imports. A copy is a process of its own in all that tests look at: signals, exit
codes, limits, open files, how the interpreter ends. Run as a script, this file is the process that is copied.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = (
    "pgrpo.cli",
    "pgrpo.grpo",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "transformers.models.qwen3.modeling_qwen3",
)
"""All that a run imports, early or late: a copy that had to would take four CPU seconds."""


class Started:
    """A started process, with the part of ``subprocess.Popen`` that tests use; what it prints goes to files."""

    def __init__(self, pid: int, status: IO[bytes], out: IO[str], err: IO[str]) -> None:
        self.pid, self.returncode = pid, None
        self._status, self._out, self._err = status, out, err

    @property
    def stdout(self) -> str:
        """All that it printed so far."""
        self._out.seek(0)
        return self._out.read()

    @property
    def stderr(self) -> str:
        self._err.seek(0)
        return self._err.read()

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def wait(self, timeout: float = 240) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(f"process {self.pid}: {self.stderr}", timeout)
            time.sleep(0.01)
        return self.returncode  # pyright: ignore[reportReturnType]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Warm:
    """Starts ``python ARGUMENTS``, where the arguments are ``-c CODE ...``, ``-m MODULE ...`` or ``FILE ...``."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, __file__, str(theirs.fileno())]
        self._process = subprocess.Popen(command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()

    def start(self, arguments: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Started:
        """Start it in a session of its own, with ``env`` on top of this process's environment."""
        request = {"arguments": [str(a) for a in arguments], "env": {**os.environ, **(env or {})}, "cwd": str(cwd)}
        # "a": reading here does not move where the process writes.
        out, err = tempfile.TemporaryFile("a+"), tempfile.TemporaryFile("a+")  # noqa: SIM115
        reader, writer = os.pipe()
        socket.send_fds(self._socket, [json.dumps(request).encode()], [out.fileno(), err.fileno(), writer])
        os.close(writer)
        status = os.fdopen(reader, "rb", buffering=0)
        return Started(int(status.readline()), status, out, err)

    def run(self, arguments: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Started:
        """The same, and wait until it has ended."""
        started = self.start(arguments, env, cwd)
        started.wait()
        return started

    def start_on_ranks(
        self, arguments: Sequence[object], size: int, env: Mapping[str, str] | None = None
    ) -> list[Started]:
        """Start it on ``size`` ranks, with the variables that torchrun sets."""
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        everywhere = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in range(size)]
        own = [{name: str(value) for name, value in (everywhere | rank).items()} for rank in ranks]
        return [self.start(arguments, {**(env or {}), **variables}) for variables in own]

    def run_on_ranks(
        self, arguments: Sequence[object], size: int, env: Mapping[str, str] | None = None
    ) -> list[Started]:
        """The same, and wait until all have ended."""
        started = self.start_on_ranks(arguments, size, env)
        for process in started:
            process.wait()
        return started

    def close(self) -> None:
        self._socket.close()
        self._process.wait(timeout=10)


def next_request(requests: socket.socket) -> dict[str, Any]:
    """Answer requests; return once in each copy, with what it is to do. Ends with the process that asks."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 2**20, 3)
        with suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:  # watchers that are done
                pass
        if not message:
            os._exit(0)
        if not os.fork():
            break
        for descriptor in descriptors:
            os.close(descriptor)
    # A watcher, which tells the copy's process id and how it ended.
    requests.close()
    out, err, status = descriptors
    if copy := os.fork():
        os.write(status, f"{copy}\n".encode())
        os.write(status, f"{os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])}\n".encode())
        os._exit(0)
    os.close(status)
    os.setsid()
    for descriptor, number in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return json.loads(message)


def become(request: dict[str, Any]) -> None:
    """Run what ``python ARGUMENTS`` runs."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    first, *rest = request["arguments"]
    folder = "" if first in ("-c", "-m") else str(Path(first).parent)
    sys.path[:0] = [folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        module = type(sys)("__main__")
        sys.modules["__main__"] = module
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.argv = request["arguments"]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for name in EVERYTHING:
        importlib.import_module(name)
    # Else each copy walks all that was imported in each full collection and at its end, and so copies all of its memory.
    gc.collect()
    gc.freeze()
    become(next_request(socket.socket(fileno=int(sys.argv[1]))))
