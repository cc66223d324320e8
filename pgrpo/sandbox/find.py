"""Finds a launcher that works on this machine by a self-test that attacks it. If none passes, nothing runs: ``SandboxError``."""

from __future__ import annotations

import logging
import platform
import shutil
import socket
import sys
import tempfile
import threading
from functools import cache

from pgrpo.sandbox.launchers import LAUNCHERS
from pgrpo.sandbox.run import ENVIRONMENT, Limits, Sandbox, SandboxError

log = logging.getLogger("pgrpo")

# Every value must be true: the sandbox must block each action with an error of these types. {port}: a server outside of the
# sandbox; {secret}: a file outside of it.
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


def self_test(sandbox: Sandbox) -> None:
    """Run the self-test. ``SandboxError`` names the checks that failed."""
    limits = Limits(wall_s=20.0, memory_mb=256, disk_mb=1)
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as secret:
        program = _SELF_TEST.format(
            port=server.getsockname()[1],
            secret=secret.name,
            memory=limits.memory_mb << 20,
            disk=limits.disk_mb << 20,
            environment={*ENVIRONMENT, "PWD"},
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
    """Return the first launcher that passes the self-test. The result is cached in the process.

    Raises:
        SandboxError: no launcher passes; the message gives the reason for each.
    """
    with _lock:
        return _find()


@cache
def _find() -> Sandbox:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise SandboxError(f"the sandbox needs Linux on x86_64 or aarch64, not {sys.platform} {platform.machine()}")
    reasons = []
    for launcher in LAUNCHERS:
        if shutil.which(launcher.name) is None:
            reasons.append(f"{launcher.name}: not installed")
            continue
        sandbox = Sandbox(launcher)
        try:
            self_test(sandbox)
        except SandboxError as error:
            reasons.append(f"{launcher.name}: {error}")
            continue
        log.info("programs of the model run in a sandbox (%s)", launcher.name)
        return sandbox
    raise SandboxError(
        f"no sandbox works on this machine ({'; '.join(reasons)}), and programs of a model never run without one. "
        "Install bubblewrap; in a container allow namespaces (docker run --security-opt seccomp=unconfined "
        "--security-opt apparmor=unconfined, or --cap-add SYS_ADMIN); on Ubuntu "
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0; or remove the reward `code` from the recipe"
    )
