"""Rank processes that all tests of this folder share."""

import json

import pytest
import torch
from pool import Ranks
from worker import saved_by_main


@pytest.fixture(scope="session")
def processes(warm):
    """``processes(n)(function, *arguments)``: what each of n ranks returned (``pool.Ranks``)."""
    pools = {}
    yield lambda size: pools.setdefault(size, Ranks(size, warm))
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def on_ranks(processes, tmp_path_factory):
    """``on_ranks(model, n, **changes)``: what ``worker.one_update`` finds; each is made once."""
    done = {}

    def run(model, size=1, **changes):
        key = json.dumps([str(model), size, changes])
        if key not in done:
            output = tmp_path_factory.mktemp("out") / "result.pt"
            processes(size)(saved_by_main, model, changes, output)
            done[key] = torch.load(output, weights_only=True)
        return done[key]

    return run
