"""A rank that is done exits with 0, also where a thread of gloo still holds a tensor."""

import subprocess
import sys

import pytest

HELD = """
import atexit, threading, time
import torch
import torch.distributed as dist
from pgrpo.process.exit import run_and_leave

held, leaving = threading.Event(), threading.Event()
atexit.register(leaving.set)


class Held(torch.Tensor):
    def __del__(self):  # run by the thread of gloo, which is the last to let go of it
        held.set()
        leaving.wait()
        time.sleep(0.05)  # it wants the interpreter back when that would be going down


def main():
    global group
    dist.init_process_group("gloo")
    group = dist.group.WORLD  # as the caches of DTensor do: destroying it does not end its threads
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(3).as_subclass(Held), async_op=True)
        assert held.wait(60)
    else:
        time.sleep(0.5)  # rank 0 has nothing but the thread hold the tensor by then
        dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()


run_and_leave(main)
"""


def test_a_tensor_that_gloo_still_holds_does_not_abort_a_rank_that_is_done(tmp_path, warm):
    script = tmp_path / "held.py"
    script.write_text(HELD)
    for rank in warm.run_on_ranks([script], 2):
        assert rank.returncode == 0, rank.stderr


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("return 7", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no such file')", 1, "no such file\n"),
    ],
)
@pytest.mark.parametrize(("threads", "on_gpu"), [(0, False), (2, False), (2, True)])
def test_the_exit_code_and_what_was_registered_for_the_exit(body, code, message, threads, on_gpu):
    script = f"""
import atexit, ctypes, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pgrpo.process import exit as leaving

libc = ctypes.CDLL(None)
libc.strdup.restype = ctypes.c_void_p
libc.__cxa_atexit(libc.puts, ctypes.c_void_p(libc.strdup(b"registered in C")), None)

def main():
    atexit.register(print, "registered")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    {body}

class Object:
    def __del__(self):
        print("taken down")

kept, idle = Object(), ThreadPoolExecutor(1)
idle.submit(int).result()  # its thread waits for more, and nobody shuts it down: the exit does
leaving.gloo_threads = lambda: {threads}
leaving.on_gpu = lambda: {on_gpu}
leaving.run_and_leave(main)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    taken_down = "" if threads and not on_gpu else "taken down\n"
    registered = f"thread\nregistered\n{taken_down}registered in C\n"
    assert (done.returncode, done.stdout, done.stderr) == (code, registered, message)
