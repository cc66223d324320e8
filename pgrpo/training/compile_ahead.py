"""Compiles what the first update needs in a second process, while this one proves the model, reads its weights and imports vLLM.

The second process does an update of a model with few layers and random weights, at the sizes of the run. What it compiles
(torch.compile, Triton, flash-attn-4) is in the run's cache folder (``process/caches.py``) when the first update looks there. It has
ended before vLLM starts, which measures the GPU's free memory. Once for a model, its settings and a device: a file in the cache
folder tells that it was done. Whatever goes wrong here, the first update compiles.
"""

from __future__ import annotations

import ctypes
import logging
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, Self

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.admission.models import cache_file
from pgrpo.admission.on_device import random_model
from pgrpo.admission.shrink import few_layers
from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.config import Config, ModelConfig
from pgrpo.distributed.fsdp import no_gradient
from pgrpo.distributed.world import World, start
from pgrpo.model.policy import load_hf_config
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.planning.memory import LayerPlan
from pgrpo.planning.placement import free_beside_policy, gpu_memory, is_compiled, layer_plan
from pgrpo.process.caches import cache_root, use_caches
from pgrpo.process.exit import run_and_leave
from pgrpo.training.place import place_policy
from pgrpo.types import Recompute, Sample
from pgrpo.vision.families import family_of

log = logging.getLogger(__name__)
PATIENCE_S = 180.0
"""Seconds that the run waits for the second process, after all that it does meanwhile."""
CODE = f"import {__name__} as ahead\nahead.main()"
INSTEAD = "the first update compiles what is missing"


class CompileAhead:
    """The second process of a run on one device; none for several ranks, for models with images, and where layers run uncompiled.
    It is gone at the end of the ``with`` block."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self._process: subprocess.Popen[bytes] | None = None
        self._files = ExitStack()
        self._output: IO[bytes] | None = None
        self._done = Path()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self._files.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def begin(self, hf_config: PretrainedConfig) -> None:
        """Start the process, unless such a one was done before."""
        config, device = self.config, self.world.device
        if self.world.size > 1 or family_of(hf_config) or not is_compiled(config, device):
            return
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        settings = [config.model, forwards(config), config.train.token_budget]
        done = cache_file(hf_config, name, *map(repr, settings)).name
        self._done = cache_root(config.cache_dir) / "compiled" / done
        if self._done.exists():
            return
        # The keys of PyTorch's caches differ where the main module has an attribute torch.
        code = ("import torch\n" if hasattr(sys.modules["__main__"], "torch") else "") + CODE
        self._output = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        with tempfile.TemporaryFile() as given:
            given.write(pickle.dumps(config))
            given.seek(0)
            command = [sys.executable, "-c", code]
            self._process = subprocess.Popen(command, stdin=given, stdout=self._output, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        """Wait for the end of the process. Says once what went wrong."""
        if self._process is None or self._output is None:
            return
        started = time.monotonic()
        try:
            code = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._end()
            log.warning("compiling ahead was not done %.0f s after the weights were read: %s", PATIENCE_S, INSTEAD)
            return
        if code:
            self._output.seek(0)
            last = self._output.read().decode(errors="replace").strip().splitlines()[-1:]
            log.warning("compiling ahead failed (%s): %s", *last or [f"exit code {code}"], INSTEAD)
            return
        log.info(
            "compiled the first update beside reading the weights; waited %.0f s for it", time.monotonic() - started
        )
        with suppress(OSError):  # a folder that is read-only costs another such process
            self._done.parent.mkdir(parents=True, exist_ok=True)
            self._done.touch()


def forwards(config: Config) -> dict[str, Any]:
    """What the forwards of a step are compiled for: with entropy's gradient, and without any gradient (old log-probs of later
    updates, and those of the reference)."""
    return {
        "entropy_gradient": bool(config.loss.entropy_coef),
        "without_gradient": config.train.updates_per_step > 1 or bool(config.loss.kl_coef),
    }


def compile_update(config: Config, world: World) -> None:
    """Forwards and a backward of a layer of every kind, for each way of recomputation that the run's plan has."""
    hf_config = load_hf_config(config.model)
    dims, few, wanted = ModelDims.from_config(hf_config), few_layers(hf_config), forwards(config)
    plan = layer_plan(config, dims, world)
    samples = longest_samples(config, hf_config.get_text_config().vocab_size)
    if world.device.type == "cuda":  # the policy itself must not run out of memory because of this
        share = free_beside_policy(config, dims, world) * GIB / gpu_memory(world.device)
        torch.cuda.set_per_process_memory_fraction(max(0.0, share), world.device)
    modes: list[Recompute] = sorted(set(plan.recompute))

    def load(_: ModelConfig, dtype: torch.dtype) -> PreTrainedModel:
        with world.device:  # for the random numbers alone: what else a policy is made of is drawn on the CPU
            return random_model(few, ATTENTION_NAME, dtype).train()

    for mode in modes:
        policy = place_policy(
            config, world, load, LayerPlan([mode] * ModelDims.from_config(few).layers, plan.mlp_chunks)
        )
        batch = build_batch(Forest.of(samples), device=world.device, attention=policy.attention)
        if wanted["without_gradient"]:
            with no_gradient(policy):
                policy(batch)
        found = policy(batch, entropy=True)
        loss = found.logprobs.sum()
        if wanted["entropy_gradient"]:
            assert found.entropy is not None
            loss = loss + found.entropy.sum()
        loss.backward()
        world.synchronize()


def longest_samples(config: Config, vocab: int) -> list[Sample]:
    """A group as long as the run's may be, of random tokens, in one micro-batch."""
    prompt, room = config.data.max_prompt_tokens, config.train.token_budget - config.data.max_prompt_tokens
    count = max(2, min(config.rollout.group_size, room // config.max_sampled_tokens))
    length = max(2, min(config.max_sampled_tokens, room // count))
    rnd = random.Random(0)
    ids = [rnd.choices(range(vocab), k=n) for n in (prompt, *[length] * count)]
    return tokens_as_samples(ids[:1], [ids[1:]])


def main() -> None:
    """Of the second process, which is given the config."""
    run_and_leave(_main)


def _main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not without the run
    config: Config = pickle.load(sys.stdin.buffer)
    use_caches(config.cache_dir)
    with start() as world:
        compile_update(config, world)
