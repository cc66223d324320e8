"""``pgrpo bench``: times prompts that are computed once against prompts that are computed for every completion."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.admission.fits import check_lora
from pgrpo.admission.linear import check_linear
from pgrpo.admission.models import check_model
from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.commands.bench_report import Row, Shape, print_rows
from pgrpo.config import Config, ConfigError, ModelConfig, fit_world_size
from pgrpo.distributed.world import World, start
from pgrpo.model.lora import add_adapters
from pgrpo.model.policy import Policy, load_model
from pgrpo.model.recompute import set_up_layers
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.placement.choices import check_device, compute_dtype, is_compiled
from pgrpo.planning.dims import decoder_layers
from pgrpo.planning.flops import GIB, ModelDims, active_adapters, flop_ratio, forward_flops, mfu, rho, update_flops
from pgrpo.planning.hub import load_hf_config
from pgrpo.process.caches import use_caches
from pgrpo.training.place import wrap
from pgrpo.types import Recompute, Sample
from pgrpo.vision.families import attention_names, auto_class

MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
HEAD_START = 8
"""Large matrix products, about 1.5 ms each, that are queued before a timed function."""


class Job(Protocol):
    """One way to compute the log-probs of some samples, ready to be timed."""

    def old(self) -> Tensor:
        """[L] log-probs without gradient, in the order of a packed batch."""
        ...

    def update(self, recompute: Recompute, compiled: bool) -> None:
        """A forward and a backward of their mean; ``recompute`` says what the backward of each layer recomputes."""
        ...


class Packed:
    """pgrpo's packed batch: each prompt once, or a copy of the prompt in front of every completion. In ``parts`` micro-batches of
    equally many samples."""

    def __init__(
        self, policy: Policy, samples: list[Sample], *, is_shared: bool, attention: AttentionChoice | None = None,
        parts: int = 1,
    ) -> None:  # fmt: skip
        self.policy, self.layers = policy, list(decoder_layers(policy.model))
        attention, size = attention or policy.attention, -(-len(samples) // parts)
        forest = Forest.of if is_shared else Forest.repeated
        cut = [samples[i : i + size] for i in range(0, len(samples), size)]
        self.batches = [build_batch(forest(part), device=policy.device, attention=attention) for part in cut]

    def old(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.policy(batch).logprobs for batch in self.batches])

    def update(self, recompute: Recompute, compiled: bool) -> None:
        set_up_layers(self.layers, [recompute for _ in self.layers], compiled=compiled)
        for batch in self.batches:
            self.policy(batch).logprobs.mean().backward()
        self.policy.zero_grad(set_to_none=True)


def bench(
    config: Config,
    shapes: Sequence[Shape],
    *,
    recompute: Recompute = "none",
    random_weights: bool = False,
    repeats: int = 5,
) -> list[Row]:
    """Time grouped against repeated prompts on random tokens, and print a table for each shape.

    Uses only ``config.model``. ``old`` is the time of log-probs without gradient, ``update`` that of a forward and a backward.
    Both are medians of ``repeats`` rounds that run both methods in turn, on a GPU timed by device events. Weights and gradients
    are in the compute dtype; there is no optimizer. Peak memory is the memory that PyTorch allocated during an update on a GPU,
    weights included; NaN on a CPU. A method that does not fit the device's memory is left out.

    Args:
        recompute: what the backward of each layer recomputes (``model.activation_checkpointing``).
        random_weights: use random weights of the shape in the model's config.json; speed does not depend on the weights.

    Raises:
        ConfigError: several ranks, or a model that cannot be loaded.
    """
    config = fit_world_size(config, 1)
    with start() as world:
        policy = load(config, max(s.prompt + s.completion for s in shapes), world, random_weights)
        print(f"attention kernel {policy.attention.kernel}: {policy.attention.reason}")
        rows: list[Row] = []
        for shape in shapes:
            samples = tokens_as_samples(*random_tokens(shape, policy.model.config.get_text_config().vocab_size))
            timed, rate = time_jobs(
                {
                    "grouped": lambda samples=samples: Packed(policy, samples, is_shared=True),
                    "repeated": lambda samples=samples: Packed(policy, samples, is_shared=False),
                },
                policy, shape, recompute, config, repeats,
            )  # fmt: skip
            if timed:
                print_rows(timed, rate, config)
            rows += timed
    return rows


def time_jobs(
    makers: Mapping[str, Callable[[], Job]],
    policy: Policy,
    shape: Shape,
    recompute: Recompute,
    config: Config,
    repeats: int,
) -> tuple[list[Row], float]:
    """Time the jobs of one shape in turn, and compare their log-probs with those of the first job that fits.

    Returns:
        Rows of the jobs, and FLOP/s of a matrix product: the higher of two timings, before and after the jobs. Both are taken
        after the warm-up, because a cold device clocks higher than it can sustain.
    """
    device, compiled = policy.device, is_compiled(config, policy.device)
    jobs: dict[str, Job] = {}
    logprobs: dict[str, Tensor] = {}
    for method, make in makers.items():
        job = make()
        try:  # compile and warm up
            logprobs[method] = job.old()
            for _ in range(2):
                job.update(recompute, compiled)
            jobs[method] = job
        except torch.OutOfMemoryError:
            policy.zero_grad(set_to_none=True)
            print(f"{method} is left out: {shape} does not fit this device's memory")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rate = _matmul_flops(device, config)
    old: dict[str, list[float]] = {method: [] for method in jobs}
    update: dict[str, list[float]] = {method: [] for method in jobs}
    peak = dict.fromkeys(jobs, float("nan"))
    for _ in range(repeats):
        for method, job in jobs.items():
            old[method].append(_milliseconds(job.old, device))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            update[method].append(_milliseconds(lambda job=job: job.update(recompute, compiled), device))
            if device.type == "cuda":
                peak[method] = torch.cuda.max_memory_allocated() / GIB
    rate = max(rate, _matmul_flops(device, config))
    dims, completions = ModelDims.from_config(policy.model.config), [shape.completion] * shape.group_size
    adapters = active_adapters(config.model, dims)
    forward = shape.groups * forward_flops(dims, shape.prompt, completions, adapters=adapters)
    backward_too = shape.groups * update_flops(dims, shape.prompt, completions, adapters=adapters)
    rows = []
    for method in jobs:
        old_ms, update_ms = statistics.median(old[method]), statistics.median(update[method])
        rows.append(
            Row(
                **asdict(shape),
                method=method,
                checkpointing=recompute,
                old_ms=old_ms,
                update_ms=update_ms,
                mfu_old=mfu(forward, old_ms / 1e3, rate),
                mfu_update=mfu(backward_too, update_ms / 1e3, rate),
                peak_gib=peak[method],
                rho=rho(shape.prompt, completions),
                flop_ratio=flop_ratio(dims, shape.prompt, completions),
                max_dlogprob=(logprobs[method] - logprobs[next(iter(jobs))]).abs().max().item(),
            )
        )
    return rows, rate


def load(config: Config, max_sample: int, world: World, random_weights: bool) -> Policy:
    """The policy in the compute dtype on this process's device.

    Raises:
        ConfigError: there are several ranks, or the model or its adapters cannot be created on this device.
    """
    if world.size > 1:
        raise ConfigError("pgrpo bench times one device: start it without torchrun")
    use_caches(config.cache_dir)
    check_device(config, world.device)
    hf_config = load_hf_config(config.model)
    check_linear(config.model.path, hf_config, world.device)
    check_model(config.model.path, hf_config, max_sample)
    check_lora(config.model, ModelDims.from_config(hf_config))
    model = (
        random_model(config.model, compute_dtype(config), world.device) if random_weights else load_model(config.model)
    )
    if config.model.lora_rank:
        add_adapters(model, config.model, config.seed)
    policy = wrap(model, config, world).to(world.device)
    for parameter in policy.parameters():  # buffers (RoPE's frequencies) stay float32, as in training
        parameter.data = parameter.data.to(compute_dtype(config))
    return policy


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model with the shape of ``model.path`` and random weights, created on the device."""
    hf_config = load_hf_config(config)
    with device:
        model = auto_class(hf_config).from_config(
            hf_config,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention_names(hf_config, ATTENTION_NAME),
        )
    return model.train()


def random_tokens(shape: Shape, vocabulary: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts and their completions, of random tokens, the same each time."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    prompts = [ids(shape.prompt) for _ in range(shape.groups)]
    return prompts, [[ids(shape.completion) for _ in range(shape.group_size)] for _ in prompts]


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)
    # Queue matrix products first, so that the host runs ahead of the device, as it does between micro-batches in training.
    a = torch.randn(MATMUL_SIZE["cuda"], MATMUL_SIZE["cuda"], device=device, dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(HEAD_START):
        torch.mm(a, a)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _matmul_flops(device: torch.device, config: Config) -> float:
    """FLOP/s of a large square matrix product in the compute dtype; the best of ten."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(compute_dtype(config)) for _ in range(2))
    best = min(_milliseconds(lambda: a @ b, device) for _ in range(10))
    return 2 * n**3 / (best / 1e3)
