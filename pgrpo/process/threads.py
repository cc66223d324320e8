"""Makes OpenMP's waiting threads sleep while other programs want the cores.

A thread of GNU's OpenMP (PyTorch's on Linux) that waits for the others spins for milliseconds before it sleeps. On idle cores this
is fastest: waking a sleeping thread takes tens of microseconds, hundreds of times a step. But if other programs use the cores, a
spinning thread keeps the one that it waits for from running, and a step takes many times as long.

libgomp reads the number of spins when torch is imported. It lowers it to 100 (microseconds) for as long as it manages more threads
than there are cores (GOMP_SPINCOUNT in libgomp's manual). So while threads of this process queue for a core, this file makes
libgomp manage a few more threads, which sleep. Results do not depend on it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Barrier, Event, Thread

import torch

LOOK_EVERY_S = 0.5
CONTENDED, CALM = 0.1, 0.02
"""Seconds a second that this process's threads queue for a core, in sum: above the first, waiting threads are to sleep; below the
second for ``CALM_S``, they may spin again."""
CALM_S = 2.0


@contextmanager
def yielding_cores() -> Iterator[None]:
    """Inside this block, OpenMP's waiting threads sleep whenever this process has to queue for cores.

    Does nothing if the user set ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT``, if PyTorch uses one thread, or on systems other than
    Linux.
    """
    is_set = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    threads = torch.get_num_threads()
    if is_set or threads == 1 or not Path("/proc/self/schedstat").exists():
        yield
        return
    ended = Event()
    watch = Thread(target=_watch, args=(ended, threads), name="pgrpo-cores", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(ended: Event, threads: int) -> None:
    queued, at, calm_s, is_yielding = queued_s(), time.monotonic(), 0.0, False
    with ExitStack() as extra:
        while not ended.wait(LOOK_EVERY_S):
            queued_before, before = queued, at
            queued, at = queued_s(), time.monotonic()
            share = (queued - queued_before) / (at - before)
            calm_s = calm_s + at - before if share < CALM else 0.0
            if share > CONTENDED and not is_yielding:
                extra.enter_context(more_threads_than_cores(threads))
                is_yielding = True
            elif calm_s > CALM_S and is_yielding:
                extra.close()
                is_yielding = False


def queued_s() -> float:
    """Seconds that this process's threads have been ready to run without a core, in sum."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # the thread has ended
            total += int((task / "schedstat").read_text().split()[1])
    return total / 1e9


@contextmanager
def more_threads_than_cores(threads: int) -> Iterator[None]:
    """Inside this block libgomp manages more threads than there are cores, so that waiting threads spin next to nothing.

    Args:
        threads: of a parallel region, more than one. Asked here, PyTorch would tell this thread's number, which is 1 where it first
            runs while the main thread takes one.
    """
    cores = len(os.sched_getaffinity(0))
    teams = max(1, math.ceil((cores + 1 - threads) / (threads - 1)))
    ready, done = Barrier(teams + 1), Event()

    def hold_a_team() -> None:
        torch.zeros(1 << 17).add_(
            1
        )  # the first parallel region of a thread starts a team, which lives as long as the thread
        ready.wait()
        done.wait()

    holders = [Thread(target=hold_a_team, name="pgrpo-team", daemon=True) for _ in range(teams)]
    for holder in holders:
        holder.start()
    ready.wait()
    try:
        yield
    finally:
        done.set()
        for holder in holders:
            holder.join()
