"""Rank processes that are started once and run one function after another, in one process group (gloo) that stays."""

import os
import socket
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Client, Listener, wait

DEADLINE_S = 240


class Ranks:
    """``ranks(function, *arguments)`` runs a module's function on every rank with ``(world, *arguments)`` and returns what each
    rank returned, in order. After a failure the next call starts new processes, as ranks may still wait for each other."""

    def __init__(self, size, warm):
        self.size, self.warm, self.processes, self.ends = size, warm, [], []

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
            process.wait()
        self.processes, self.ends = [], []

    def _start(self):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": self.size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # functions come by their modules' names
        with Listener(family="AF_UNIX") as listener:
            for rank in range(self.size):
                environment = {name: str(value) for name, value in (group | {"RANK": rank}).items()} | paths
                self.processes.append(self.warm.start([__file__, listener.address], environment))
                self.ends.append(listener.accept())


def serve(address):
    import torch
    import torch.distributed as dist

    from pgrpo.distributed.world import World

    calls = Client(address, family="AF_UNIX")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
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


if __name__ == "__main__":
    serve(sys.argv[1])
