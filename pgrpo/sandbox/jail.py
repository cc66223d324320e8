"""Runs inside the sandbox: drops all remaining privileges, then runs the program. Standard library only: ``run.py`` sends this
file as text, followed by a call of ``main``. Imports dominate the start time, so there are few (``_signal``, not ``signal``).

The steps: make a file system that holds only Python (unless the launcher did), become another user, drop capabilities, start a
supervisor that ends everything at the deadline or when the trainer dies, and in its child set the limits and the system call
filter and run the program. The program is one process (threads are allowed), so its limits bound everything that it does.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import struct
import sys
import time
from _signal import ITIMER_REAL, SIG_IGN, SIGALRM, SIGINT, SIGKILL, setitimer, signal  # pyright: ignore[reportMissingImports]

# Denied system calls: numbers on (x86_64, aarch64). None: the architecture has no such call.
DENIED = {
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "personality": (135, 92), "fanotify_init": (300, 262), "mknod": (133, None),
    "mknodat": (259, 33), "modify_ldt": (154, None), "quotactl": (179, 60), "acct": (163, 89),
    "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "syslog": (103, 116),
}  # fmt: skip
CLONE, CLONE3, SOCKET, PRLIMIT = (56, 220), (435, 435), (41, 198), (302, 261)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

EPERM, EACCES, ENOSYS = 1, 13, 38
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MNT_DETACH = 2, 4, 4096, 16384, 2
libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """Call a libc function. OSError unless it returns 0."""
    if getattr(libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind, options)]
    call("mount", texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])


def read_only(path: str, recursive: bool) -> None:
    """Remount read-only by mount_setattr(2), Linux 5.12, which can include the mounts below and keeps their other flags."""
    attributes = struct.pack("4Q", 1 | 2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID
    flags = ctypes.c_uint(0x8000 if recursive else 0)  # AT_RECURSIVE
    call("syscall", ctypes.c_long(442), -100, path.encode(), flags, attributes, ctypes.c_size_t(len(attributes)))


def make_root(spec: dict) -> None:
    """Make a file system of ``spec['links']`` and, read-only, ``spec['paths']``. Only /work is writable, up to a size."""
    root = "/proc"  # exists everywhere, and no path to mount is below it
    mount("none", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, target in spec["links"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)
    for path in spec["paths"]:
        inside = root + path
        os.makedirs(inside if os.path.isdir(path) else os.path.dirname(inside), exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(path, inside, None, MS_BIND | MS_REC)
        read_only(inside, recursive=True)
    os.mkdir(root + "/work")
    options = f"size={spec['disk']},nr_inodes={spec['files']},mode=1777"
    mount("none", root + "/work", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")
    read_only("/", recursive=False)


def drop_privileges(uid: int | None) -> None:
    """Become user ``uid`` (if root; None keeps the current user of the user namespace) and drop all capabilities."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)  # _LINUX_CAPABILITY_VERSION_3
    call("capset", header, nothing)
    prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    prctl(1, SIGKILL)  # PR_SET_PDEATHSIG again: the change of user cleared the launcher's


def prctl(option: int, value: int, pointer: object = None) -> None:
    call("prctl", option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0))


def filter_system_calls() -> None:
    """Install a seccomp filter for this process and its threads: no new process or program, and only local sockets."""
    column, audit = ARCHITECTURES[os.uname().machine]
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    load, equal, at_least, has_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    rules = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]  # architecture, then number
    rules += [(at_least, 0, 1, 0x40000000), (give, 0, 0, error | EPERM)]  # x32 numbers
    for numbers in DENIED.values():
        if numbers[column] is not None:
            rules += [(equal, 0, 1, numbers[column]), (give, 0, 0, error | EPERM)]
    # A filter cannot read clone3's flags; after ENOSYS libc uses clone.
    rules += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, error | ENOSYS)]
    # 16 is the first argument. clone: only CLONE_THREAD. socket: only AF_UNIX. prlimit64: only of the process itself; limits on
    # the supervisor could kill it, which would count as a fault of the sandbox.
    rules += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (has_bit, 1, 0, 0x10000), (give, 0, 0, error | EPERM)]
    rules += [(give, 0, 0, allow)]
    rules += [(equal, 0, 4, SOCKET[column]), (load, 0, 0, 16), (equal, 1, 0, 1), (give, 0, 0, error | EACCES)]
    rules += [(give, 0, 0, allow)]
    rules += [(equal, 0, 4, PRLIMIT[column]), (load, 0, 0, 16), (equal, 1, 0, 0), (give, 0, 0, error | EPERM)]
    rules += [(give, 0, 0, allow), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
    prctl(22, 2, program)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def limit(spec: dict) -> None:
    limits = {
        "AS": spec["memory"], "FSIZE": spec["disk"], "NOFILE": 64, "NPROC": spec["threads"], "CORE": 0,
        "MEMLOCK": 0, "MSGQUEUE": 0, "SIGPENDING": 64,
    }  # fmt: skip
    for name, value in limits.items():  # 11: RLIMIT_SIGPENDING, which Python lacks
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}", 11), (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (spec["cpu"], spec["cpu"] + 1))


def supervise(child: int, spec: dict) -> None:
    """Wait for the program. Exit, which ends all processes of the sandbox, after ``wall`` seconds, when the trainer died, or when
    the program made more than ``files`` files (some launchers' file systems have no such limit)."""
    end = time.monotonic() + spec["wall"]

    def look(*_: object) -> None:
        # One for each call: on a busy host the next signal comes before this one's poll has returned.
        trainer = select.poll()
        trainer.register(spec["ready_fd"], 0)  # polls as an error once nobody can read the pipe
        space = os.statvfs("/work")
        if time.monotonic() > end or trainer.poll(0):
            os._exit(124)
        if space.f_files - space.f_ffree > spec["files"]:
            os.write(2, b"OSError: more than %d files\n" % spec["files"])
            os._exit(1)

    signal(SIGINT, SIG_IGN)  # Python handles it by default, so the program could send it to this process
    signal(SIGALRM, look)
    setitimer(ITIMER_REAL, 0.02, 0.02)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def main(spec: dict) -> None:
    with open(spec["program_fd"], encoding="utf-8") as file:
        source = file.read()
    if spec["make_root"]:
        make_root(spec)
    os.chdir("/work")
    drop_privileges(spec["uid"])
    child = os.fork()
    if child:
        supervise(child, spec)
    import site  # after the fork: only the program needs `exit`

    site.setquit()
    with open("main.py", "w", encoding="utf-8") as file:  # for the source lines in tracebacks
        file.write(source)
    sys.argv[:] = ["main.py"]
    sys.path.insert(0, "/work")
    code = compile("", "main.py", "exec")  # loads the compiler before the filter is set
    limit(spec)
    filter_system_calls()
    os.write(spec["ready_fd"], b"1")
    os.close(spec["ready_fd"])
    code = compile(source, "main.py", "exec")
    names = {"__name__": "__main__", "__builtins__": __builtins__, "__file__": "main.py"}
    exec(code, names)
