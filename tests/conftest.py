"""Fixtures that several test files share."""

import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# torch reads these when it is imported. One thread in each process, also in those that tests start: two workers run at a time,
# and tiny matrices gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # in this process: workers for it would import torch first
import torch
from warm import Warm

CODE = Path(tempfile.gettempdir()) / f"pgrpo_tests_{os.getuid()}"  # not where a user's runs keep compiled code
for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "HF_MODULES_CACHE"):
    os.environ.setdefault(name, str(CODE / name.lower()))

if not torch.cuda.is_available():  # the tests of Triton kernels interpret them; Triton reads it when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Leave out of garbage collection what is imported and collected by now, which stays anyway, and collect less often: walking
    these million objects again and again took a third of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The quick start's model without its warm start."""
    script = runpy.run_path(str(ROOT / "scripts" / "make_tiny_model.py"))
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    script["make_model"]().save_pretrained(folder)
    script["make_tokenizer"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Starts Python processes that have imported pgrpo already."""
    processes = Warm()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def launch(warm):
    """``launch(arguments, ranks)``: run Python with these arguments, under torchrun if there are several ranks."""

    def run(arguments, ranks):
        if ranks == 1:
            return warm.run(arguments)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        return subprocess.run(
            [*command, *map(str, arguments)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
        )

    return run


@pytest.fixture(scope="session")
def on_ranks(launch, tmp_path_factory):
    """``on_ranks(model, ranks, **changes)``: what tests/distributed/worker.py finds; each run is made once."""
    done = {}

    def run(model, ranks=1, **changes):
        key = json.dumps([str(model), ranks, changes])
        if key not in done:
            output = tmp_path_factory.mktemp("out") / "result.pt"
            worker = ROOT / "tests" / "distributed" / "worker.py"
            result = launch([worker, model, output, json.dumps(changes)], ranks)
            assert result.returncode == 0, result.stderr
            done[key] = torch.load(output, map_location="cpu", weights_only=True)
        return done[key]

    return run
