"""``pgrpo bench``: time prompts that are computed once against prompts that are computed for every completion."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.commands.bench_methods import METHODS, Job, why_not
from pgrpo.commands.bench_report import Row, Shape, make_report, print_rows, write_report
from pgrpo.config import Config, ConfigError
from pgrpo.distributed.world import World, start
from pgrpo.model.lora import adapter_parameters, add_adapters, check_lora
from pgrpo.model.policy import Policy, check_supported, load_hf_config, load_model
from pgrpo.model.proof import tokens_as_groups
from pgrpo.planning.flops import GIB, ModelDims, flop_ratio, forward_flops, mfu, rho, update_flops
from pgrpo.planning.placement import check_device, compute_dtype, is_compiled, wrap
from pgrpo.types import Group, Keep

MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}
HEAD_START = 8
"""Large products, about 1.5 ms each."""


def bench(
    config: Config,
    shapes: Sequence[Shape],
    *,
    methods: Sequence[str] = METHODS,
    checkpointing: Sequence[str] = ("none",),
    random_weights: bool = False,
    repeats: int = 5,
    json_file: Path | None = None,
    profile_file: Path | None = None,
) -> list[Row]:
    """Time the methods on random tokens; after each shape print a table and add its rows to ``json_file`` if one is given (rows
    that are there stay, unless they are measured again).

    Uses only ``config.model``. ``old`` is the log-probs without gradient, ``update`` a forward and a backward; both are medians of
    ``repeats`` rounds that go through all methods in turn, on a GPU by device events. Weights and gradients are in the compute
    dtype; there is no optimizer. Peak memory, weights included, is what PyTorch allocated during an update on a GPU; on a CPU it
    is the peak resident memory of one update in a fresh process, over what that process held before it loaded the model. A method
    that does not fit is left out.

    Args:
        shapes: what to time, one after the other.
        methods: of ``METHODS``; ``grouped``, which the others are compared with, is always among them.
        checkpointing: what layers compute again in the backward; every shape is timed with each.
        random_weights: make weights up from the model's config.json alone: speed does not depend on them.
        profile_file: write the time of each kernel of one grouped update (last shape and checkpointing) there.

    Raises:
        ConfigError: several ranks, no such method, no folder for a file, or a ``json_file`` of another device or other versions.
    """
    for option, file in (("--json", json_file), ("--profile", profile_file)):
        if file and not file.absolute().parent.is_dir():
            raise ConfigError(f"{option} {file}: there is no folder {file.parent}: create it first")
    if unknown := [m for m in methods if m not in METHODS]:
        raise ConfigError(f"--methods: {unknown[0]!r} is not a method; there are {', '.join(METHODS)}")
    methods = [m for m in METHODS if m in methods or m == "grouped"]
    if unknown := [c for c in checkpointing if c not in get_args(Keep)]:
        raise ConfigError(f"--checkpointing: {unknown[0]!r} is none of {', '.join(get_args(Keep))}")
    keeps: list[Keep] = [keep for keep in get_args(Keep) if keep in checkpointing]
    console = Console()
    console.width = max(console.width, 110)  # a pipe or a narrow terminal must not cut the methods' names
    with start() as world:
        if world.size > 1:
            raise ConfigError("pgrpo bench times one device: start it without torchrun")
        check_device(config, world.device)
        check_lora(config.model, ModelDims.from_config(load_hf_config(config.model)))
        peaks: dict[tuple[Shape, Keep, str], float] = {}
        if world.device.type == "cpu":  # first, as this process's own memory only grows
            peaks = _resident_peaks(config, shapes, methods, keeps, random_weights)
        policy = _load(config, max(s.prompt + s.completion for s in shapes), world, random_weights)
        console.print(f"attention kernel {policy.attention.kernel}: {policy.attention.reason}")
        rows: list[Row] = []
        for shape in shapes:
            for keep in keeps:
                timed, rate = _time(policy, shape, methods, keep, config, repeats, console)
                for row in timed:
                    row.peak_gib = peaks.get((shape, keep, row.method), row.peak_gib)
                rows += timed
                print_rows(timed, rate, config, console)
                if json_file:
                    write_report(make_report(timed, world.device), json_file)
        if profile_file:
            _profile(policy, shapes[-1], keeps[-1], config, profile_file)
    return rows


def _time(
    policy: Policy, shape: Shape, methods: Sequence[str], keep: Keep, config: Config, repeats: int, console: Console
) -> tuple[list[Row], float]:
    """Rows of one shape, and FLOP/s of a matrix product: the higher of two timings, before the methods and after, both on a
    device that the warm-up has brought to its working temperature (a cold one clocks higher than it can keep up)."""
    device, groups = policy.device, random_groups(shape, policy.model.config.vocab_size)
    compiled = is_compiled(config, device)
    jobs: dict[str, Job] = {}
    logprobs: dict[str, torch.Tensor] = {}
    for method in methods:
        if why := why_not(method, device, groups):
            console.print(f"{method} is left out: {why}")
            continue
        job = Job(policy, method, groups)
        try:  # compiles and warms up
            logprobs[method] = job.old()
            for _ in range(2):
                job.update(keep, compiled)
            jobs[method] = job
        except torch.OutOfMemoryError:
            policy.zero_grad(set_to_none=True)
            console.print(f"{method} is left out: {shape} does not fit this device's memory")
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
            update[method].append(_milliseconds(lambda job=job: job.update(keep, compiled), device))
            if device.type == "cuda":
                peak[method] = torch.cuda.max_memory_allocated() / GIB
    rate = max(rate, _matmul_flops(device, config))
    dims, completions = ModelDims.from_config(policy.model.config), [shape.completion] * shape.group_size
    adapters = adapter_parameters(config.model, dims)
    forward = shape.groups * forward_flops(dims, shape.prompt, completions, adapters=adapters)
    backward_too = shape.groups * update_flops(dims, shape.prompt, completions, adapters=adapters)
    rows = []
    for method in jobs:
        old_ms, update_ms = statistics.median(old[method]), statistics.median(update[method])
        rows.append(
            Row(
                **asdict(shape),
                method=method,
                checkpointing=keep,
                old_ms=old_ms,
                update_ms=update_ms,
                mfu_old=mfu(forward, old_ms / 1e3, rate),
                mfu_update=mfu(backward_too, update_ms / 1e3, rate),
                peak_gib=peak[method],
                rho=rho(shape.prompt, completions),
                flop_ratio=flop_ratio(dims, shape.prompt, completions),
                max_dlogprob=(logprobs[method] - logprobs["grouped"]).abs().max().item(),
            )
        )
    return rows, rate


def _load(config: Config, max_sample: int, world: World, random_weights: bool) -> Policy:
    model = random_model(config, max_sample, world.device) if random_weights else load_model(config.model, max_sample)
    if config.model.lora_rank:
        add_adapters(model, config.model, config.seed)
    policy = wrap(model, config, world).to(world.device)
    for parameter in policy.parameters():  # not the buffers: RoPE's frequencies stay float32, as in a run
        parameter.data = parameter.data.to(compute_dtype(config))
    return policy


def random_model(config: Config, max_sample: int, device: torch.device) -> PreTrainedModel:
    """A model of ``model.path``'s shape, made on the device in the compute dtype."""
    hf_config = load_hf_config(config.model)
    check_supported(hf_config, max_sample)
    with device:
        model = AutoModelForCausalLM.from_config(
            hf_config, dtype=compute_dtype(config), attn_implementation=ATTENTION_NAME
        )
    return model.train()


def random_groups(shape: Shape, vocabulary: int) -> list[Group]:
    """Groups of random tokens, the same each time, with rewards that differ."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    prompts = [ids(shape.prompt) for _ in range(shape.groups)]
    return tokens_as_groups(prompts, [[ids(shape.completion) for _ in range(shape.group_size)] for _ in prompts])


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - started)
    # Products queued first let the host run ahead of the device, as it does between the micro-batches of a training step.
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


def _resident_peaks(
    config: Config, shapes: Sequence[Shape], methods: Sequence[str], checkpointing: Sequence[Keep], random_weights: bool
) -> dict[tuple[Shape, Keep, str], float]:
    """GiB of each update, one child process at a time."""
    cpu = torch.device("cpu")
    peaks = {}
    for shape in shapes:
        for keep in checkpointing:
            for method in methods:
                if why_not(method, cpu, []):
                    continue
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    future = pool.submit(_peak_resident_gib, config, method, shape, keep, random_weights)
                    peaks[shape, keep, method] = future.result()
    return peaks


def _peak_resident_gib(config: Config, method: str, shape: Shape, keep: Keep, random_weights: bool) -> float:
    """Of one update, over what this process held before it loaded the model."""
    before, world = _resident_gib("VmRSS"), World(0, 1, torch.device("cpu"))
    policy = _load(config, shape.prompt + shape.completion, world, random_weights)
    job = Job(policy, method, random_groups(shape, policy.model.config.vocab_size))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    job.update(keep, is_compiled(config, world.device))
    return _resident_gib("VmHWM") - before


def _resident_gib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak). Not ``ru_maxrss``: in a spawned process that starts from its parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return kib * 1024 / GIB


def _profile(policy: Policy, shape: Shape, keep: Keep, config: Config, file: Path) -> None:
    job = Job(policy, "grouped", random_groups(shape, policy.model.config.vocab_size))
    job.update(keep, is_compiled(config, policy.device))
    with torch.profiler.profile() as profile:
        job.update(keep, is_compiled(config, policy.device))
        World(0, 1, policy.device).synchronize()
    order = f"self_{policy.device.type}_time_total"
    file.write_text(profile.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=100))
