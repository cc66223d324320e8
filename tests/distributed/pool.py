"""Rank processes that are started once and run one function after another, in one process group (gloo) that stays."""

import multiprocessing
import os
import socket
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

START = multiprocessing.get_context("spawn")
DEADLINE_S = 240


class Ranks:
    """``ranks(function, *arguments)`` runs a module's function on every rank with ``(world, *arguments)`` and returns what each
    rank returned, in order. After a failure the next call starts new processes, as ranks may still wait for each other."""

    def __init__(self, size):
        self.size, self.processes, self.ends = size, [], []

    def __call__(self, function, *arguments):
        if not self.processes:
            self._start()
        for end in self.ends:
            end.send((function, arguments))
        results = {}
        while len(results) < self.size:
            ready = wait([end for end in self.ends if end not in results], timeout=DEADLINE_S)
            for end in (end for end in self.ends if end in ready):
                try:
                    results[end], failed = end.recv()
                except EOFError:
                    failed = "the process died"
                if failed:
                    rank = self.ends.index(end)
                    self.close()
                    raise AssertionError(f"rank {rank} of {self.size}: {failed}")
            if not ready:
                self.close()
                raise AssertionError(f"{self.size} ranks are not done after {DEADLINE_S} s")
        return [results[end] for end in self.ends]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.ends = [], []

    def _start(self):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in range(self.size):
            end, theirs = START.Pipe()
            process = START.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.ends.append(end)


def _serve(rank, size, port, calls):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    import torch
    import torch.distributed as dist

    from pgrpo.distributed.world import World

    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", timeout=timedelta(seconds=DEADLINE_S))
    dist.destroy_process_group = lambda: None  # what ``world.start`` would leave with; the next call wants it
    while True:
        try:
            function, arguments = calls.recv()
        except EOFError:
            return
        try:
            answer = function(World(rank, size, torch.device("cpu")), *arguments), None
        except BaseException:
            answer = None, traceback.format_exc()
        calls.send(answer)
