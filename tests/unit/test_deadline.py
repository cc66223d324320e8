"""A call that hangs ends the process, and says so."""

import subprocess
import sys
import time

import pytest

from pgrpo.process.deadline import deadline

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
