"""OpenMP's waiting threads spin on idle cores and sleep on busy ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from pgrpo.distributed.world import start
from pgrpo.process import threads

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the kernel of Linux tells who queues for cores"
)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def is_watching() -> bool:
    return any(thread.name == "pgrpo-cores" for thread in threading.enumerate())


def cpu_s() -> float:
    """CPU seconds of one short parallel region and 5 ms in which the main thread sleeps: what the other thread spins."""
    x, before = torch.zeros(1 << 17), time.process_time()
    for _ in range(20):
        x.add_(1)
        time.sleep(0.005)
    return (time.process_time() - before) / 20


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_waiting_threads_sleep_while_this_process_queues_for_cores(two_threads, monkeypatch):
    queued, is_busy, at = 0.0, False, time.monotonic()

    def queued_s() -> float:
        nonlocal queued, at
        now = time.monotonic()
        queued, at = queued + 0.5 * is_busy * (now - at), now
        return queued

    monkeypatch.setattr(threads, "queued_s", queued_s)
    monkeypatch.setattr(threads, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(threads, "CALM_S", 0.1)
    with start():
        assert is_watching()
        count, idle = threading.active_count(), cpu_s()
        is_busy = True
        until(lambda: threading.active_count() > count)
        busy = cpu_s()
        is_busy = False
        until(lambda: threading.active_count() == count)
        idle_again = cpu_s()
    assert not is_watching() and idle > 0.001
    assert busy < 0.3 * idle and busy < 0.3 * idle_again


def test_time_that_threads_queue_for_a_core_is_counted():
    cores = os.sched_getaffinity(0)
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(0, {core := min(cores)})
        os.sched_setaffinity(rival.pid, {core})
        before, at = threads.queued_s(), time.monotonic()
        while time.monotonic() < at + 0.5:
            pass
        assert 0.1 < threads.queued_s() - before < 0.6  # half of it, if nothing else runs there
    finally:
        os.sched_setaffinity(0, cores)
        rival.kill()
        rival.wait()


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_the_users_own_policy_is_left_alone(name, two_threads, monkeypatch):
    monkeypatch.setenv(name, "1000")
    with start():
        assert not is_watching()


def test_one_thread_waits_for_no_other(two_threads):
    torch.set_num_threads(1)
    with start():
        assert not is_watching()


def test_a_part_of_a_run_that_takes_one_thread_leaves_the_watch_alive(two_threads, monkeypatch):
    looks, is_busy = 0, False

    def queued_s() -> float:
        nonlocal looks
        looks += 1
        return float(looks * is_busy)

    monkeypatch.setattr(threads, "queued_s", queued_s)
    monkeypatch.setattr(threads, "LOOK_EVERY_S", 0.02)
    with start():
        count = threading.active_count()
        torch.set_num_threads(1)  # before the watch first asks
        is_busy = True
        until(lambda: threading.active_count() > count)
        assert is_watching()
