"""Compiles for the first step in two more processes, while this one proves the model, reads its weights and imports vLLM.

One does an update of a model with few layers and random weights, at the sizes of the run, in micro-batches that call unlike
kernels. What it compiles (torch.compile, Triton, flash-attn-4) is in the run's cache folder (``process/caches.py``) when the first
update looks there. The other compiles vLLM's model (``rollout/vllm/ahead.py``), which vLLM loads when it starts. Both have ended
before vLLM starts, which measures the GPU's free memory. Once for a model, its settings and a device: a file in the folder of the
code tells that it was done. Whatever goes wrong here, the run compiles. So it does with what this leaves out: a teacher's forwards,
and those of passes over a kept prefix.
"""

from __future__ import annotations

import logging
import os
import pickle
import random
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from transformers import PretrainedConfig, PreTrainedModel

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.admission.models import cache_file
from pgrpo.admission.on_device import kernel_releases, random_model
from pgrpo.admission.shrink import few_layers
from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.attention.kernels.flash import LOOKED_UP_SEGMENTS
from pgrpo.attention.layout import PackedLayout, unpack_calls
from pgrpo.config import Config, ModelConfig
from pgrpo.distributed.fsdp import no_gradient
from pgrpo.distributed.world import World, start
from pgrpo.model.lora import adapters_off
from pgrpo.model.policy import load_hf_config
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.placement.awake import engine_memory
from pgrpo.placement.choices import attention_choice, engine_name, is_compiled
from pgrpo.placement.layers import free_beside_policy, layer_plan
from pgrpo.placement.sizes import gpu_memory
from pgrpo.placement.vllm_memory import SAMPLER_BYTES, VLLM_ACTIVATIONS_GIB, vllm_gib
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.planning.recompute import LayerPlan
from pgrpo.process.caches import FOLDERS, use_caches
from pgrpo.process.exit import run_and_leave
from pgrpo.process.second import SecondProcess, ahead_codes, end_early
from pgrpo.rollout.vllm import start as vllm_start
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
        """Wait for the end of both. Meanwhile this process imports what vLLM's start needs."""
        if self.sampler.is_begun and vllm_start.is_installed():
            vllm_start.import_engine(self.world.device)
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
        unlike_batches(config, dims, device).kernels,
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
    batches, vocab = unlike_batches(config, dims, world.device).batches, hf_config.get_text_config().vocab_size
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
        # The ways of recomputation call the same kernels.
        for number, sizes in enumerate(batches if mode == modes[0] else batches[:1]):
            forest = Forest.of(sizes.samples(vocab))
            batch = build_batch(forest, device=world.device, attention=policy.attention)
            if wanted["without_gradient"] and not number:
                with no_gradient(policy):
                    policy(batch)
            if wanted["without_adapters"] and not number:
                with no_gradient(policy), adapters_off(policy):
                    policy(batch)
            found = policy(batch, entropy=True)
            loss = found.logprobs.sum()
            if wanted["entropy_gradient"]:
                assert found.entropy is not None
                loss = loss + found.entropy.sum()
            loss.backward()
            world.synchronize()


class FlatBatch(NamedTuple):
    """Sizes of a micro-batch whose groups share nothing with each other: groups, tokens of a prompt, completions of a group, tokens
    of a completion."""

    groups: int
    prompt: int
    completions: int
    completion: int

    def samples(self, vocab: int) -> list[Sample]:
        """Of random tokens."""
        rnd = random.Random(0)
        lengths = self.prompt, *[self.completion] * self.completions
        groups = [[rnd.choices(range(vocab), k=n) for n in lengths] for _ in range(self.groups)]
        return tokens_as_samples([group[0] for group in groups], [group[1:] for group in groups])

    def kernels(self, attention: AttentionChoice) -> set[tuple[bool, ...]]:
        """What chooses kernels of attention on a GPU. Of each call: causal or not, a window, many segments; apart: copied keys."""
        completions = self.groups * self.completions
        lengths = [self.prompt] * self.groups + [self.completion] * completions
        parents = [-1] * self.groups + [i // self.completions for i in range(completions)]
        layout = PackedLayout(lengths, parents, choice=attention)
        calls = [call for window in (None, *attention.windows) for call in unpack_calls(layout.passes(window).table)]
        flash = {(bool(x.causal), bool(x.window), x.segments > LOOKED_UP_SEGMENTS) for x in calls}
        return flash | {(True,) for x in calls if x.copied}


class UnlikeBatches(NamedTuple):
    """Micro-batches of a run that call unlike kernels, and these kernels."""

    batches: list[FlatBatch]
    kernels: list[tuple[bool, ...]]


def unlike_batches(config: Config, dims: ModelDims, device: torch.device) -> UnlikeBatches:
    """As few as call every kernel that long and short prompts call with long and short completions, in one group and in as many as
    fit, each with few tokens, for it has less memory than the run. The longest group is the first."""
    attention = replace(attention_choice(config, dims, device), windows=tuple({*dims.windows} - {0}))
    most = config.rollout.prompts_per_step
    few_first = [*(2**n for n in range(most.bit_length()) if 2**n < most), most]
    found: list[FlatBatch] = []
    called: set[tuple[bool, ...]] = set()
    for sizes in ((1, 1, 1), *product(few_first, (4, 1), (4, 1))):
        batch = flat_batch(config, *sizes)
        kernels = batch.kernels(attention)
        if not kernels <= called:
            found.append(batch)
            called |= kernels
    return UnlikeBatches(found, sorted(called))


def flat_batch(config: Config, groups: int, shorter_prompts: int, shorter_completions: int) -> FlatBatch:
    """So many groups, or as many as fit one micro-batch, of prompts and completions as long as the run's may be, or so many times
    shorter. At least two completions, however short."""
    budget, size = config.train.token_budget, config.rollout.group_size
    prompt = max(1, config.data.max_prompt_tokens // shorter_prompts)
    completion = max(1, config.max_sampled_tokens // shorter_completions)
    count = max(2, min(size, (budget - prompt) // completion))
    length = max(2, min(completion, (budget - prompt) // count))
    return FlatBatch(max(1, min(groups, budget // (prompt + size * length))), prompt, count, length)


def main(cache_dir: str | None) -> None:
    """Of the process of the update, which is given the config."""
    use_caches(cache_dir)
    config: Config = pickle.load(sys.stdin.buffer)
    run_and_leave(partial(_main, config))


def _main(config: Config) -> None:
    with start() as world:
        compile_update(config, world)
