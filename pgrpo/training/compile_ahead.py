"""Compiles for the first step in two more processes, while this one proves the model, reads its weights and imports vLLM.

One does an update of a model with few layers and random weights, at the sizes of the run. What it compiles (torch.compile, Triton,
flash-attn-4) is in the run's cache folder (``process/caches.py``) when the first update looks there. The other compiles vLLM's
model (``rollout/vllm/ahead.py``), which vLLM loads when it starts. Both have ended before vLLM starts, which measures the GPU's
free memory. Once for a model, its settings and a device: a file in the folder of the code tells that it was done. Whatever goes
wrong here, the run compiles. So it does with what this leaves out: a teacher's forwards, and those of passes over a kept prefix.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Self

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
from pgrpo.placement.awake import engine_memory
from pgrpo.placement.choices import engine_name, is_compiled
from pgrpo.placement.layers import free_beside_policy, layer_plan
from pgrpo.placement.sizes import gpu_memory
from pgrpo.placement.vllm_memory import SAMPLER_BYTES, VLLM_ACTIVATIONS_GIB, vllm_gib
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.planning.recompute import LayerPlan
from pgrpo.process.caches import FOLDERS, use_caches
from pgrpo.process.exit import run_and_leave
from pgrpo.process.second import SecondProcess, ahead_codes, end_early
from pgrpo.training.place import place_policy
from pgrpo.types import Recompute, Sample
from pgrpo.vision.families import family_of

log = logging.getLogger(__name__)
PATIENCE_S = 180.0
"""Seconds that the run waits for the update's process, after all that it does meanwhile."""
SAMPLER_PATIENCE_S = 120.0
"""The same for vLLM's model: longer than vLLM takes to compile it."""
CONTEXT_GIB = 1.5
"""GPU memory of a process with CUDA's context and libraries."""
UPDATE, SAMPLER = "the first update", "vLLM's model"
INSTEAD = "the first update compiles what is missing"


class CompileAhead:
    """The processes of a run on one device; none for several ranks, for models with images, and where nothing is compiled. They are
    gone at the end of the ``with`` block."""

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        update, sampler = ahead_codes(config.cache_dir)
        self.update = SecondProcess(UPDATE, update, INSTEAD)
        self.sampler = SecondProcess(SAMPLER, sampler, "vLLM compiles when it starts")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.update.end()
        self.sampler.end()

    def begin(self, hf_config: PretrainedConfig) -> None:
        """Start what was not done before. Logs what prevents it."""
        try:
            if self.world.size == 1 and not family_of(hf_config):
                self._begin(hf_config)
        except Exception as error:  # of files, of pickle, or of the config, which the run's own checks refuse
            log.warning("compiling ahead did not begin (%s: %s): %s", type(error).__name__, error, INSTEAD)
        end_early()

    def _begin(self, hf_config: PretrainedConfig) -> None:
        config, world, dims = self.config, self.world, ModelDims.from_config(hf_config)
        if is_compiled(config, world.device):
            self.update.begin(config, done_file(config, hf_config, world))
        if sampler_gib(config, dims, world):
            sleeps = engine_memory(config, dims, world).sleeps
            self.sampler.begin((config, sleeps), sampler_done_file(config, hf_config, world, sleeps=sleeps))

    def wait(self) -> None:
        """Wait for the end of both."""
        self.sampler.wait(SAMPLER_PATIENCE_S)
        self.update.wait(PATIENCE_S)

    def sampler_started(self) -> None:
        """vLLM has compiled by itself what was missing: later runs need no process for it."""
        self.sampler.mark()


def sampler_gib(config: Config, dims: ModelDims, world: World) -> float:
    """GiB of the GPU that the process takes which compiles vLLM's model: its weights and the activations of a prefill. 0: there is
    no such process, since nothing is compiled, or since it would take more than half of what the policy leaves free."""
    if world.device.type != "cuda" or engine_name(config, world.device) != "vllm" or config.rollout.enforce_eager:
        return 0.0
    sampler = config.rollout.max_concurrent * dims.vocab * SAMPLER_BYTES / GIB
    needed = vllm_gib(config, dims, 0) + VLLM_ACTIVATIONS_GIB + sampler + CONTEXT_GIB
    return needed if needed <= free_beside_policy(config, dims, world) / 2 else 0.0


def sampler_done_file(config: Config, hf_config: PretrainedConfig, world: World, *, sleeps: bool) -> Path:
    """Tells that vLLM's model was compiled, by all that decides what vLLM compiles."""
    rollout, data = config.rollout, config.data
    settings = [
        config.model,
        [config.max_sample_tokens, data.max_prompt_tokens, config.tensor_parallel_size, sleeps],
        [rollout.max_concurrent, rollout.group_size, rollout.shared_decode, rollout.compare_experts],
        [metadata.version("vllm"), torch.cuda.get_device_name(world.device)],
    ]
    key = cache_file(hf_config, *kernel_releases(), *map(repr, settings), also=("rollout", "process"))
    return Path(os.environ.get("VLLM_CACHE_ROOT") or "~/.cache/vllm").expanduser() / "compiled_ahead" / key.stem


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
        free = free_beside_policy(config, dims, world) - sampler_gib(config, dims, world)
        share = free * GIB / gpu_memory(world.device)
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


def main(cache_dir: str | None) -> None:
    """Of the process of the update, which is given the config."""
    use_caches(cache_dir)
    config: Config = pickle.load(sys.stdin.buffer)
    run_and_leave(partial(_main, config))


def _main(config: Config) -> None:
    with start() as world:
        compile_update(config, world)
