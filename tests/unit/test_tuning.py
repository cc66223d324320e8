"""Triton's autotuner compiles the variants of a kernel together, and times and keeps the same as before. Triton compiles for a GPU
without one; what is timed here is made up."""

import gc
import json
import os
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from pgrpo.process.caches import FOLDERS, TUNED, use_caches
from pgrpo.process.tuning import CACHE_MODE, CHOSEN, CONFIG_DIR, compile_variants_together, use_chosen

SLOWEST_FIRST = {1: 3.0, 2: 1.0, 4: 2.0}
"""Milliseconds of a variant, by its warps."""


class Kernel:
    """What an autotuner knows of a ``triton.jit`` function. Compiles at once outside of Triton's mode for several."""

    def __init__(self, fails=()):
        self.fails, self.compiled, self.launched = fails, [], []
        self.barrier = threading.Barrier(len(SLOWEST_FIRST), timeout=20)
        self.fn = lambda x, n: None

    def run(self, x, *, grid, warmup, num_warps, **_):
        from triton.runtime import _async_compile

        mode = _async_compile.active_mode.get()
        assert (mode is not None) == warmup
        if not warmup:
            if num_warps in self.fails:
                raise PTXAS("no registers")
            self.launched.append(num_warps)
            return
        assert mode is not None
        mode.submit(num_warps, lambda: self._compile(num_warps), lambda _: None)

    def _compile(self, num_warps):
        self.barrier.wait()  # ends only if all variants compile at the same time
        if num_warps in self.fails:
            raise PTXAS("no registers")
        self.compiled.append(num_warps)


try:
    from triton.runtime.errors import PTXASError as PTXAS
except ImportError:
    PTXAS = RuntimeError


@pytest.fixture
def tuner(monkeypatch):
    """Makes an autotuner of a ``Kernel``, in a process whose autotuners compile variants together."""
    autotuner = pytest.importorskip("triton.runtime.autotuner")
    monkeypatch.setattr(autotuner.Autotuner, "_bench", autotuner.Autotuner._bench)  # put back after the test
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(len(SLOWEST_FIRST)))
    compile_variants_together()

    def make(kernel):
        def timed(call, quantiles):
            call()
            return [SLOWEST_FIRST[kernel.launched[-1]]] * 3

        configs = [autotuner.Config({}, num_warps=warps) for warps in SLOWEST_FIRST]
        return autotuner.Autotuner(kernel, ["x", "n"], configs, ["n"], None, None, do_bench=timed)

    return make


def test_variants_compile_together_and_each_is_timed_alone(tuner):
    kernel = Kernel()
    tuned = tuner(kernel)
    tuned.run(0, n=5, grid=(1,), warmup=False)
    assert sorted(kernel.compiled) == [1, 2, 4]
    assert kernel.launched == [1, 2, 4, 2]  # timed in their order; then the quickest computes
    tuned.run(0, n=5, grid=(1,), warmup=False)
    assert (len(kernel.compiled), kernel.launched[4:]) == (3, [2])  # of the same key: no other round
    tuned.run(0, n=6, grid=(1,), warmup=False)
    assert (len(kernel.compiled), kernel.launched[5:]) == (6, [1, 2, 4, 2])


def test_a_variant_that_does_not_compile_is_left_out_as_before(tuner):
    kernel = Kernel(fails=[2])
    tuner(kernel).run(0, n=5, grid=(1,), warmup=False)
    assert (sorted(kernel.compiled), kernel.launched) == ([1, 4], [1, 4, 4])


def test_a_kernel_that_was_tuned_keeps_none_of_its_tensors(tuner):
    """A batch's activations would stay on the GPU until the kernel is tuned again."""
    tuned, given = tuner(Kernel()), torch.zeros(3)
    alive = weakref.ref(given)
    tuned.run(given, n=5, grid=(1,), warmup=False)
    del given
    gc.collect()
    assert alive() is None


def test_it_is_said_once(tuner):
    from triton.runtime.autotuner import Autotuner

    once = Autotuner._bench
    compile_variants_together()
    assert Autotuner._bench is once


def test_fla_reads_what_is_chosen_unless_a_user_chose(monkeypatch):
    for name in (CONFIG_DIR, CACHE_MODE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    use_chosen()
    assert (os.environ[CONFIG_DIR], os.environ[CACHE_MODE]) == (str(CHOSEN), "full")
    for path in CHOSEN.iterdir():
        found = json.loads(path.read_text())
        assert path.stem == found["kernel_name"]
        assert found["default_config"].keys() == {"kwargs", "num_warps", "num_stages", "num_ctas"}
    monkeypatch.delenv(CONFIG_DIR)
    monkeypatch.setenv(CACHE_MODE, "disabled")
    use_chosen()
    assert (os.environ.get(CONFIG_DIR), os.environ[CACHE_MODE]) == (None, "disabled")


def kernel(x, n):
    """Of two processes."""


def test_what_one_process_has_tuned_others_that_share_the_folder_read(monkeypatch, tmp_path):
    """Triton's own code, but for the GPU: of kernels that do not ask for it."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import autotuner

    for name in (*FOLDERS, TUNED):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(autotuner, "driver", SimpleNamespace(active=target))
    configs = [autotuner.Config({}, num_warps=warps) for warps in SLOWEST_FIRST]

    def process():
        """Variants that it times, and what it launches."""
        timed, launched = [], []
        use_caches(str(tmp_path))
        tuner = autotuner.Autotuner(
            triton.jit(kernel), ["x", "n"], configs, ["n"], None, None, do_bench=lambda *_, **__: None
        )
        tuner._bench = lambda *_, config, **__: timed.append(config.num_warps) or [SLOWEST_FIRST[config.num_warps]] * 3
        tuner.fn.run = lambda *_, num_warps, **__: launched.append(num_warps)
        tuner.run(0, n=5, grid=(1,), warmup=False)
        return timed, launched

    assert process() == ([1, 2, 4], [2])
    assert process() == ([], [2])
