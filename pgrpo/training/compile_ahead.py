"""Compiles what the first update needs in a second process, while this one proves the model, reads its weights and imports vLLM.

The second process does an update of a model with few layers and random weights, at the sizes of the run. What it compiles
(torch.compile, Triton, flash-attn-4) is in the run's cache folder (``process/caches.py``) when the first update looks there. It has
ended before vLLM starts, which measures the GPU's free memory. Once for a model, its settings and a device: a file in the folder of
torch.compile's code tells that it was done. Whatever goes wrong here, the first update compiles. So it does with what this leaves
out: the forwards of a teacher, and those of passes over a kept prefix.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Self

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import PretrainedConfig, PreTrainedModel

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.admission.models import cache_file
from pgrpo.admission.on_device import kernel_releases, random_model
from pgrpo.admission.shrink import few_layers
from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.config import Config, ModelConfig
from pgrpo.distributed.fsdp import no_gradient
from pgrpo.distributed.world import World, start
from pgrpo.model.lora import adapters_off
from pgrpo.model.policy import load_hf_config
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.placement.choices import is_compiled
from pgrpo.placement.layers import free_beside_policy, layer_plan
from pgrpo.placement.sizes import gpu_memory
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.planning.memory import LayerPlan
from pgrpo.process.caches import FOLDERS, use_caches
from pgrpo.process.exit import run_and_leave
from pgrpo.training.place import place_policy
from pgrpo.types import Recompute, Sample
from pgrpo.vision.families import family_of

log = logging.getLogger(__name__)
PATIENCE_S = 180.0
"""Seconds that the run waits for the second process, after all that it does meanwhile."""
BEGIN = """
import sys
sys.path[:] = sys.argv[2:]
import ctypes, os, signal
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
del ctypes, os, signal, sys
"""
"""First code of the second process, whose arguments are the run's process and ``sys.path``. The path is set before any import: else
modules in the current folder come first. The process ends with the run (1 is PR_SET_PDEATHSIG), also if that has ended by now."""
CODE = f"import {__name__} as ahead\nahead.main()\n"
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
        """Start the process, unless such a one was done before. Logs what prevents it."""
        try:
            self._begin(hf_config)
        except Exception as error:  # of files, of pickle, or of the config, which the run's own checks refuse
            log.warning("compiling ahead did not begin (%s: %s): %s", type(error).__name__, error, INSTEAD)

    def _begin(self, hf_config: PretrainedConfig) -> None:
        config, device = self.config, self.world.device
        if self.world.size > 1 or family_of(hf_config) or not is_compiled(config, device):
            return
        self._done = done_file(config, hf_config, self.world)
        if self._done.exists():
            return
        # The keys of PyTorch's caches differ where the main module has an attribute torch.
        code = BEGIN + ("import torch\n" if hasattr(sys.modules["__main__"], "torch") else "") + CODE
        self._output = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        with tempfile.TemporaryFile() as given:
            given.write(pickle.dumps(config))
            given.seek(0)
            command = [sys.executable, "-c", code, str(os.getpid()), *sys.path]
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


def done_file(config: Config, hf_config: PretrainedConfig, world: World) -> Path:
    """Tells that this process was done, by all that decides what it compiles. It is gone when torch.compile's code is."""
    device, dims = world.device, ModelDims.from_config(hf_config)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    plan = layer_plan(config, dims, world)
    settings = [
        config.model,
        forwards(config),
        config.train.token_budget,
        (sorted(set(plan.recompute)), plan.mlp_chunks),
        [os.environ.get(folder) for folder in FOLDERS if folder != "VLLM_CACHE_ROOT"],
    ]
    key = cache_file(
        hf_config, name, *kernel_releases(), *map(repr, settings), also=("training", "distributed", "process")
    )
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()) / "compiled_ahead" / key.stem


def forwards(config: Config) -> dict[str, bool]:
    """What the forwards of a step are compiled for: with entropy's gradient, without any gradient (old log-probs of later updates,
    and those of a reference that is a model of its own), and without gradient and adapters (of a reference with LoRA)."""
    old, reference, lora = config.train.updates_per_step > 1, bool(config.loss.kl_coef), bool(config.model.lora_rank)
    return {
        "entropy_gradient": bool(config.loss.entropy_coef),
        "without_gradient": old or (reference and not lora),
        "without_adapters": reference and lora,
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
        if wanted["without_adapters"]:
            with no_gradient(policy), adapters_off(policy):
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
    config: Config = pickle.load(sys.stdin.buffer)
    use_caches(config.cache_dir)
    with start() as world:
        compile_update(config, world)
