"""The trainer's side of worker processes: starts them, talks to them, kills them. ``worker.py`` runs inside them, ``remote.py``
calls tools and environments there."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pgrpo.config import ConfigError, remember
from pgrpo.config.task import ImageConfig
from pgrpo.environments.calls import START_S, CallFailed, WorkerDied, describe
from pgrpo.environments.worker import receive, send

PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV",
    "CONDA_PREFIX", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CUDA_VISIBLE_DEVICES", "CUDA_HOME",
    "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS",
)  # fmt: skip
"""Environment variables that every worker sees; and those that begin with LC_ or PYTHON."""
LOOK_S = 300.0
"""Seconds in which the user's modules have to be imported at the start."""
CLOSE_S = 10.0
"""Seconds for all environments together to close at the end."""
FILES = 8192
"""Open files that many workers may take, each a socket, where the system allows it."""
DIED = "its worker process ended in the middle of the call (out of memory, os._exit, or a crash)"


def variables(secrets: Sequence[str]) -> dict[str, str]:
    """What workers see of this process's environment variables. ConfigError if a secret is not set."""
    if missing := [name for name in secrets if name not in os.environ]:
        raise ConfigError(
            f"environment.secrets: the environment variable {missing[0]} is not set; set it, or leave it out"
        )
    for name in secrets:
        remember(os.environ[name])  # redacted in what this process writes; what a tool prints goes to stderr as it is
    passed = {n: v for n, v in os.environ.items() if n in (*PASSED, *secrets) or n.startswith(("LC_", "PYTHON"))}
    return {"OMP_NUM_THREADS": "1"} | passed  # there are many of them


class Nursery:
    """Starts workers; thread-safe. It is started at the first one, and again if it has died.

    Args:
        secrets: names of environment variables that workers see beside those of everyone.
        limits: of images that tools give.
    """

    def __init__(self, secrets: Sequence[str] = (), limits: ImageConfig | None = None) -> None:
        self._variables, self._lock = variables(secrets), threading.Lock()
        self._limits = limits or ImageConfig()
        self._control: socket.socket | None = None
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < FILES:
            most = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

    def worker(self) -> Worker:
        """A new process. CallFailed if it does not start."""
        ours, theirs = socket.socketpair()
        ours.settimeout(START_S)
        try:
            with theirs:
                self._send(theirs)
            return Worker(ours, int(receive(ours)))
        except (OSError, EOFError) as error:
            ours.close()
            raise CallFailed(f"a worker process could not be started: {describe(error)}") from error

    def close(self) -> None:
        """End all workers."""
        with self._lock:
            if self._control is not None:
                self._end()
                self._control = None

    def _send(self, connection: socket.socket) -> None:
        with self._lock:
            for _ in range(2):
                if self._control is None:
                    self._start()
                assert self._control is not None
                try:
                    socket.send_fds(self._control, [b"w"], [connection.fileno()])
                    return
                except (BrokenPipeError, ConnectionResetError):  # it was killed
                    self._end()
                    self._control = None
        raise OSError("the process that starts them ends at once")

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {sys.path!r}; import socket; from pgrpo.environments.worker import nursery; "
            f"nursery(socket.socket(fileno={theirs.fileno()}), {self._limits.max_file_pixels})"
        )
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-u", "-c", code],
                pass_fds=[theirs.fileno()],
                env=self._variables,
                stdin=subprocess.DEVNULL,
                stdout=2,  # what tools print goes where warnings go; the terminal of a run is the trainer's
                start_new_session=True,  # Ctrl-C is for the trainer
            )
        self._control = ours
        self._end = weakref.finalize(self, _end, ours, process)


def _end(control: socket.socket, process: subprocess.Popen[bytes]) -> None:
    control.close()  # it returns then, and the kernel kills its workers
    try:
        process.wait(CLOSE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Worker:
    """One process, for one caller at a time. ``is_alive`` is false once it was killed, or was seen to have died."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self._connection, self.pid, self.is_alive = connection, pid, True
        self._loaded: set[str] = set()
        connection.settimeout(None)

    def ask(self, operation: str, /, **arguments: Any) -> Any:
        """The result of an operation of ``worker.Server``.

        Raises:
            CallFailed: the user's function raised.
            WorkerDied: the process has ended.
            ConfigError: what the config names cannot be used.
        """
        return self.exchange((operation, arguments))

    def exchange(self, message: Any) -> Any:
        """Send a message, wait for the answer. What a conversation asks is returned as a dict with ``do``."""
        try:
            data = pickle.dumps(message)
        except Exception as error:
            raise CallFailed(f"a value cannot be sent to a worker process: {describe(error)}") from error
        try:
            send(self._connection, data)
            answer = json.loads(receive(self._connection))
        except (EOFError, OSError):
            self.kill()
            raise WorkerDied(DIED) from None
        if "error" in answer:
            raise CallFailed(answer["error"])
        if "refused" in answer:
            raise ConfigError(answer["refused"])
        return answer["ask"] if "ask" in answer else answer["value"]

    def load(self, name: str, key: str) -> None:
        """Have it import a function or class; a worker that cannot is killed."""
        if name in self._loaded:
            return
        self.limit(START_S)
        try:
            self.ask("load", name=name, key=key)
        except BaseException:
            self.kill()
            raise
        self.limit(None)
        self._loaded.add(name)

    def limit(self, seconds: float | None) -> None:
        """Give up after so many seconds without an answer."""
        self._connection.settimeout(seconds)

    def kill(self) -> None:
        """Kill the process and what it started. Who waits for its answer gets WorkerDied."""
        if not self.is_alive:
            return
        self.is_alive = False
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        self._connection.close()
