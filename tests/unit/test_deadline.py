"""A call that hangs ends the process, and says so; work that takes too long is interrupted."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from pgrpo.process.deadline import TimeUp, deadline, time_limit

HANG = """
import time
from pgrpo.process.deadline import deadline
with deadline(0.5, "vLLM's weight push", "rollout.vllm_deadline_s"):
    time.sleep(60)
"""


@pytest.mark.faults
def test_a_hanging_call_ends_the_process_at_its_deadline():
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and time.monotonic() - started < 40
    first, *rest = done.stderr.splitlines()
    assert first.startswith("vLLM's weight push took longer than rollout.vllm_deadline_s=0.5 seconds and was ended")
    assert "--resume auto" in first and any("<string>" in line for line in rest), "where it hung"


def test_a_call_in_time_is_left_alone():
    with deadline(0.05, "a call", "key"):
        pass
    with pytest.raises(ZeroDivisionError), deadline(0.05, "a call", "key"):
        _ = 1 / 0
    time.sleep(0.2)


@pytest.mark.parametrize("in_main", [True, False])
def test_work_is_interrupted_at_its_limit_even_if_it_swallows_that_once(in_main):
    """Limit 0.2 s, and once more a second later."""
    took, handler = [], signal.getsignal(signal.SIGALRM)

    def wait():
        while True:
            time.sleep(30 if in_main else 0.01)

    def wait_twice(began):
        try:
            wait()
        except BaseException:
            took.append(time.monotonic() - began)
        wait()

    def work():
        began = time.monotonic()
        with pytest.raises(TimeUp), time_limit(0.2):
            wait_twice(began)
        took.append(time.monotonic() - began)
        with time_limit(0.2):  # one that ends in time is not interrupted, nor is what follows
            time.sleep(0.05)
        time.sleep(0.4)
        took.append(0.0)

    if in_main:
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(30)
    first, second, _ = took
    assert 0.2 <= first < 1.1 and 1.2 <= second < 5
    assert signal.getsignal(signal.SIGALRM) is handler
