"""Runs Python that a model wrote: no network, no files of this machine, no environment, bounded in every resource.

A launcher (``unshare`` of util-linux, or ``bwrap``) starts Python in namespaces of its own, where ``jail.py`` gives up
what is left and runs the program. What works on a machine is found out by attacking it once (``_SELF_TEST``). Where no
launcher passes there is no sandbox, and nothing runs: ``SandboxError``.

The kernel is shared with the program: this holds back what a policy stumbles on or learns to try. It is not meant for
people who bring kernel exploits; run those in a virtual machine.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Literal

log = logging.getLogger("pgrpo")

_JAIL = (Path(__file__).parent / "jail.py").read_text()
_ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "2", "PATH": ""}
_PYTHON = ["-S", "-s", "-P", "-B"]  # standard library only; no writing of .pyc


End = Literal["exit", "time", "output"]


class SandboxError(RuntimeError):
    """There is no sandbox on this machine, or it could not start. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one program. ``wall_s`` counts from its start; the others are the kernel's limits of its one process."""

    wall_s: float = 10.0
    cpu_s: int = 10
    memory_mb: int = 512
    """Address space, of which CPython itself takes some 20 MB."""
    disk_mb: int = 16
    """Files in its working folder, which is in memory and gone afterwards."""
    output_kb: int = 1024
    """Of stdout and stderr each; a program that writes more is ended."""
    threads: int = 32


@dataclass(frozen=True, slots=True)
class Result:
    """``end``: it exited with ``status``, or was ended by the wall time or for its output. A signal N is status 128 + N."""

    end: End
    status: int
    stdout: str
    stderr: str
    wall_s: float


@dataclass(frozen=True, slots=True)
class _Launcher:
    """``command``: arguments of the program ``name``, before Python's. ``make_root``: ``jail.py`` makes the file system."""

    name: str
    command: Callable[[Limits], list[str]]
    make_root: bool


class Sandbox:
    """A launcher that passed the self-test. Threads may share it."""

    def __init__(self, launcher: _Launcher) -> None:
        self.name = launcher.name
        self._launcher = launcher

    def run(self, program: str, stdin: str = "", limits: Limits = Limits()) -> Result:
        """Run ``program`` as ``__main__``. ``SandboxError`` if the sandbox itself cannot start."""
        with _sealed(program) as program_file, _sealed(stdin) as stdin_file:
            spec = {
                "program_fd": program_file.fileno(),
                "make_root": self._launcher.make_root,
                "uid": _own_uid(program_file.fileno()),
                "paths": _python_files()[0],
                "links": _python_files()[1],
                "memory": limits.memory_mb << 20,
                "disk": limits.disk_mb << 20,
                "threads": limits.threads,
                "cpu": limits.cpu_s,
                "wall": limits.wall_s + 1,  # this process ends it earlier, and knows that it did
            }
            python = [os.path.realpath(sys.executable), *_PYTHON, "-c", _JAIL, json.dumps(spec)]
            begin = time.monotonic()
            try:
                process = subprocess.Popen(
                    [shutil.which(self.name) or self.name, *self._launcher.command(limits), *python],
                    stdin=stdin_file,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=_ENVIRONMENT,
                    cwd="/",
                    pass_fds=[program_file.fileno()],
                    start_new_session=True,
                )
            except OSError as error:
                raise SandboxError(f"the sandbox ({self.name}) cannot start: {error}") from error
            try:
                end, data = _collect(process, begin + limits.wall_s, limits.output_kb << 10)
            finally:
                _end(process)
        stdout, stderr = (part.decode("utf-8", "replace") for part in data)
        return Result(end, process.returncode, stdout, stderr, time.monotonic() - begin)


def _sealed(text: str) -> IO[bytes]:
    """A file in memory that whoever inherits it can only read."""
    file = os.fdopen(os.memfd_create("pgrpo", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "w+b")
    file.write(text.encode("utf-8", "replace"))
    file.seek(0)
    fcntl.fcntl(file, 1033, 0x1 | 0x2 | 0x4 | 0x8)  # F_ADD_SEALS: no more seals, shrinking, growing, writing
    return file


def _collect(process: subprocess.Popen[bytes], deadline: float, limit: int) -> tuple[End, list[bytes]]:
    """Read stdout and stderr until they close, the deadline, or more than ``limit`` bytes of one."""
    pipes = [process.stdout, process.stderr]
    data = [bytearray(), bytearray()]
    end: End = "exit"
    with selectors.DefaultSelector() as selector:
        for pipe, received in zip(pipes, data, strict=True):
            assert pipe is not None  # both were asked for
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
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:  # it closed its pipes and goes on
            end = "time"
    return end, [bytes(received[:limit]) for received in data]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the launcher, and with it (a PID namespace dies with its first process) everything that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _own_uid(number: int) -> int | None:
    """As root: a user that owns nothing, another one for each program that runs, as the kernel counts threads by user.

    ``number`` tells apart the programs of this process. From the range that systemd keeps free for such users.
    """
    return 61184 + (os.getpid() * 61 + number) % 4096 if os.geteuid() == 0 else None


@cache
def _python_files() -> tuple[list[str], dict[str, str]]:
    """(paths that Python needs, links among them): the interpreter, its library, the system's shared libraries."""
    wanted = [os.path.realpath(sys.executable), "/dev/null", "/dev/urandom", "/etc/ld.so.cache", "/nix/store"]
    wanted += [os.path.realpath(f"{p}/lib") for p in {sys.base_prefix, sys.base_exec_prefix}]
    wanted += ["/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    links = {path: os.readlink(path) for path in wanted if os.path.islink(path)}
    paths: list[str] = []
    for path in sorted({p for p in wanted if os.path.exists(p) and p not in links}):
        if not any(path.startswith(f"{other}/") for other in paths):
            paths.append(path)
    return paths, links


def _unshare(_: Limits) -> list[str]:
    spaces = ["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    # Root needs no user namespace, and becomes another user inside; in one it would count as the owner of its files.
    return spaces if os.geteuid() == 0 else ["--user", "--map-root-user", *spaces]


def _bwrap(limits: Limits) -> list[str]:
    paths, links = _python_files()
    spaces = ["--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-pid"]
    command = [*spaces, "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    # Each folder above a path by name: bwrap makes those that it is not told of unreadable to other users.
    for folder in sorted({str(parent) for path in (*paths, *links) for parent in Path(path).parents} - {"/"}):
        command += ["--perms", "755", "--dir", folder]
    for link, target in links.items():
        command += ["--symlink", target, link]
    for path in paths:
        command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    command += ["--perms", "1777", "--size", str(limits.disk_mb << 20), "--tmpfs", "/work", "--remount-ro", "/"]
    return [*command, "--"]


# unshare is part of every Linux, and bounds the number of files too. bwrap may be allowed where an unshare is not (AppArmor).
_LAUNCHERS = (_Launcher("unshare", _unshare, make_root=True), _Launcher("bwrap", _bwrap, make_root=False))

# Each line must fail, with an error that the sandbox causes, or be true. {port}: a server of ours; {secret}: our file.
_SELF_TEST = """
import ctypes, os, socket, threading
def refused(action, *errors):
    try:
        action()
    except errors:
        return True
    return False
def connect(): socket.create_connection(("127.0.0.1", {port}), 1)
def file(path, mode): return lambda: open(path, mode)
worked = threading.Event()
threading.Thread(target=worked.set).start()
print({{
    "no network": refused(connect, OSError),
    "no file of this machine": refused(file({secret!r}, "r"), FileNotFoundError) and not os.path.exists("/etc/passwd"),
    "nothing can be written outside": refused(file("/x", "w"), OSError) and refused(file(os.__file__, "a"), OSError),
    "no other process": refused(os.fork, PermissionError) and not os.path.exists("/proc/self"),
    "no other program": refused(lambda: os.execv("/work", ["x"]), PermissionError),
    "memory is bounded": refused(lambda: bytearray({memory}), MemoryError),
    "files are bounded": refused(lambda: os.truncate(os.open("big", os.O_CREAT | os.O_RDWR), {disk} + 1), OSError),
    "the environment is empty": set(os.environ) <= {environment},
    "no capability": refused(lambda: os.chroot("/work"), PermissionError) and refused(lambda: os.setgid(4), OSError),
    "threads work": worked.wait(5),
}})
"""


def _test(sandbox: Sandbox) -> None:
    """``SandboxError`` unless every line of the self-test holds."""
    limits = Limits(wall_s=20.0, memory_mb=256, disk_mb=1)
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as secret:
        program = _SELF_TEST.format(
            port=server.getsockname()[1],
            secret=secret.name,
            memory=limits.memory_mb << 20,
            disk=limits.disk_mb << 20,
            environment={*_ENVIRONMENT, "PWD"},
        )
        result = sandbox.run(f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n{program}", "", limits)
    if result.status != 0 or not result.stdout.startswith("{"):
        reason = " ".join(result.stderr.strip().splitlines()[-1:]) or f"{result.end}, status {result.status}"
        raise SandboxError(reason)
    failed = [part.split("'")[1] for part in result.stdout.strip("{}\n").split(",") if not part.endswith("True")]
    if failed:
        raise SandboxError(f"self-test failed: {', '.join(failed)}")


_lock = threading.Lock()


def find_sandbox() -> Sandbox:
    """The first launcher that passes the self-test, tried once in a process.

    Raises:
        SandboxError: none does; says why each fails. Nothing runs without a sandbox.
    """
    with _lock:
        return _find()


@cache
def _find() -> Sandbox:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SandboxError(
            f"code of a model runs on Linux on x86_64 or aarch64, not {sys.platform} {platform.machine()}"
        )
    reasons = []
    for launcher in _LAUNCHERS:
        if shutil.which(launcher.name) is None:
            reasons.append(f"{launcher.name}: not installed")
            continue
        sandbox = Sandbox(launcher)
        try:
            _test(sandbox)
        except SandboxError as error:
            reasons.append(f"{launcher.name}: {error}")
            continue
        log.info("code of the model runs in a sandbox (%s)", launcher.name)
        return sandbox
    raise SandboxError(
        f"there is no sandbox on this machine ({'; '.join(reasons)}), and code of a model never runs without one. "
        "Install bubblewrap; in a container allow namespaces (docker run --security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined, or --cap-add SYS_ADMIN); on Ubuntu "
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0; or take the reward `code` out of the recipe"
    )
