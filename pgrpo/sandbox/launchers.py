"""Command lines of ``unshare`` (util-linux) and ``bwrap``, which start Python in new namespaces."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Launcher:
    """A program ``name`` that starts Python in new namespaces.

    Attributes:
        command: size of the working folder in bytes -> arguments before Python's command line.
        make_root: whether ``jail.py`` has to make the file system.
    """

    name: str
    command: Callable[[int], list[str]]
    make_root: bool


@cache
def python_files() -> tuple[list[str], dict[str, str]]:
    """Return (paths that Python needs, symlinks among them): the interpreter, its library, the shared libraries of the system."""
    wanted = [os.path.realpath(sys.executable), "/dev/null", "/dev/urandom", "/etc/ld.so.cache", "/nix/store"]
    wanted += [os.path.realpath(f"{p}/lib") for p in {sys.base_prefix, sys.base_exec_prefix}]
    wanted += ["/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    links = {path: os.readlink(path) for path in wanted if os.path.islink(path)}
    paths: list[str] = []
    for path in sorted({p for p in wanted if os.path.exists(p) and p not in links}):
        if not any(path.startswith(f"{other}/") for other in paths):
            paths.append(path)
    return paths, links


def _unshare(_: int) -> list[str]:
    spaces = ["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    # Root needs no user namespace and becomes another user inside. In a user namespace it would still own its files.
    return spaces if os.geteuid() == 0 else ["--user", "--map-root-user", *spaces]


def _bwrap(disk: int) -> list[str]:
    paths, links = python_files()
    spaces = ["--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-pid"]
    command = [*spaces, "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user"]
    # Create each parent folder explicitly: bwrap makes implicit parents unreadable for other users.
    for folder in sorted({str(parent) for path in (*paths, *links) for parent in Path(path).parents} - {"/"}):
        command += ["--perms", "755", "--dir", folder]
    for link, target in links.items():
        command += ["--symlink", target, link]
    for path in paths:
        command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    command += ["--perms", "1777", "--size", str(disk), "--tmpfs", "/work", "--remount-ro", "/"]
    return [*command, "--"]


LAUNCHERS = (Launcher("unshare", _unshare, make_root=True), Launcher("bwrap", _bwrap, make_root=False))
"""unshare is part of every Linux. AppArmor may allow bwrap but not unshare."""
