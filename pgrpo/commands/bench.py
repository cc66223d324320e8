"""``pgrpo bench``: time prompts that are computed once against prompts that are computed for every completion."""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgrpo.attention.interface import ATTENTION_NAME
from pgrpo.batch import build_batch
from pgrpo.config import Config, ConfigError
from pgrpo.distributed import start
from pgrpo.exactness import tokens_as_groups
from pgrpo.flops import ModelDims, flop_ratio, forward_flops, mfu, rho, update_flops
from pgrpo.logprobs import token_logprobs
from pgrpo.policy import Policy, load_model, logit_scale
from pgrpo.training.run import check_device
from pgrpo.types import Group

GIB = 2**30
METHODS: tuple[str, ...] = ("grouped", "repeated_packed", "repeated_padded")
MATMUL_SIZE = {"cpu": 1536, "cuda": 8192}


@dataclass(frozen=True)
class Shape:
    """``groups`` groups of ``group_size`` completions; lengths in tokens."""

    prompt: int
    completion: int
    group_size: int
    groups: int


@dataclass
class Row:
    """One method. Milliseconds; MFU counts each prompt token once and no recomputation, against a measured matrix product."""

    prompt: int
    completion: int
    group_size: int
    groups: int
    method: str
    checkpointing: str
    old_ms: float
    update_ms: float
    mfu_old: float
    mfu_update: float
    peak_gib: float
    rho: float
    flop_ratio: float
    max_dlogprob: float


def bench(config: Config, shape: Shape, *, repeats: int = 5, json_file: Path | None = None) -> list[Row]:
    """Time all methods on random tokens, print a table, and write ``json_file`` if one is given.

    Uses only ``config.model``. ``old`` is the log-probs without gradient, ``update`` a forward and a backward; both are medians of
    ``repeats`` rounds that go through all methods in turn. Peak memory, weights included, is what PyTorch allocated during an
    update on a GPU; on a CPU it is the peak resident memory of one update in a fresh process, over what that process held
    before it loaded the model.

    Raises:
        ConfigError: several ranks, or no folder for ``json_file``.
    """
    if json_file and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_file}: there is no folder {json_file.parent}: create it first")
    with start() as world:
        if world.size > 1:
            raise ConfigError("pgrpo bench times one device: start it without torchrun")
        check_device(config, world)
        device = world.device
        peak: dict[str, float] = {}
        if (
            device.type == "cpu"
        ):  # before this process needs memory itself; one child at a time: resident memory only grows
            for method in METHODS:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                    peak[method] = pool.submit(_peak_resident_gib, config, method, shape).result()
        rate = _matmul_flops(device, config)
        policy, groups = _load(config, shape, device)
        dims = ModelDims.from_config(policy.model.config)
        jobs = {method: _Job(policy, method, groups) for method in METHODS}
        logprobs = {method: job.old() for method, job in jobs.items()}
        old: dict[str, list[float]] = {method: [] for method in METHODS}
        update: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(repeats + 1):  # the first round warms up
            for method, job in jobs.items():
                old[method].append(_milliseconds(job.old, device))
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                update[method].append(_milliseconds(job.update, device))
                if device.type == "cuda":
                    peak[method] = torch.cuda.max_memory_allocated() / GIB
        rate = max(rate, _matmul_flops(device, config))
    completions = [shape.completion] * shape.group_size
    useful_old = shape.groups * forward_flops(dims, shape.prompt, completions)
    useful_update = shape.groups * update_flops(dims, shape.prompt, completions)
    rows = []
    for method in METHODS:
        old_ms, update_ms = statistics.median(old[method][1:]), statistics.median(update[method][1:])
        row = Row(
            **asdict(shape),
            method=method,
            checkpointing=config.model.activation_checkpointing,
            old_ms=old_ms,
            update_ms=update_ms,
            mfu_old=mfu(useful_old, old_ms / 1e3, rate),
            mfu_update=mfu(useful_update, update_ms / 1e3, rate),
            peak_gib=peak[method],
            rho=rho(shape.prompt, completions),
            flop_ratio=flop_ratio(dims, shape.prompt, completions),
            max_dlogprob=(logprobs[method] - logprobs["grouped"]).abs().max().item(),
        )
        rows.append(row)
    _print(rows, rate, config)
    if json_file:
        json_file.write_text(json.dumps(_report(rows, device), indent=1) + "\n")
    return rows


class _Job:
    """One method, ready to run. All methods share one copy of the weights, so that each one's peak memory is its own."""

    def __init__(self, policy: Policy, method: str, groups: list[Group]) -> None:
        self.model = policy.model
        if method == "repeated_padded":
            self.attention = "sdpa"
            padded = _Padded(groups, policy.device)
            self.forward: Callable[[], Tensor] = lambda: padded.logprobs(policy.model)
        else:
            self.attention = ATTENTION_NAME
            batch = build_batch(groups, share_prompts=method == "grouped", device=policy.device)
            self.forward = lambda: policy(batch).logprobs

    def old(self) -> Tensor:
        self.model.set_attn_implementation(self.attention)
        with torch.no_grad():
            return self.forward()

    def update(self) -> None:
        self.model.set_attn_implementation(self.attention)
        self.forward().mean().backward()
        self.model.zero_grad(set_to_none=True)


class _Padded:
    """What a padded trainer does: a right-padded batch, every completion behind a copy of its prompt, transformers' sdpa."""

    def __init__(self, groups: list[Group], device: torch.device) -> None:
        samples = [(g.prompt.token_ids, c.token_ids) for g in groups for c in g.completions]
        width = max(len(p) + len(c) for p, c in samples)
        ids = torch.zeros(len(samples), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        rows: list[int] = []
        for i, (prompt, completion) in enumerate(samples):
            length = len(prompt) + len(completion)
            ids[i, :length], mask[i, :length] = torch.tensor(prompt + completion), 1
            rows += range(i * width + len(prompt) - 1, i * width + length - 1)
        self.ids, self.mask, self.rows = ids.to(device), mask.to(device), torch.tensor(rows, device=device)
        self.targets = torch.tensor([t for _, completion in samples for t in completion], device=device)

    def logprobs(self, model: PreTrainedModel) -> Tensor:
        """[L] in the order of a packed batch."""
        hidden = model.base_model(input_ids=self.ids, attention_mask=self.mask, use_cache=False).last_hidden_state
        head: nn.Linear = model.lm_head  # pyright: ignore[reportAssignmentType]
        hidden_LE = hidden.flatten(0, 1).index_select(0, self.rows)
        return token_logprobs(hidden_LE, head.weight, self.targets, logit_scale(model.config)).logprobs


def _load(config: Config, shape: Shape, device: torch.device) -> tuple[Policy, list[Group]]:
    model = load_model(config.model, max_sample=shape.prompt + shape.completion)
    policy = Policy(model).to(device, getattr(torch, config.model.dtype))
    return policy, _random_groups(shape, model.config.vocab_size)


def _random_groups(shape: Shape, vocabulary: int) -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    prompts = [ids(shape.prompt) for _ in range(shape.groups)]
    return tokens_as_groups(prompts, [[ids(shape.completion) for _ in range(shape.group_size)] for _ in prompts])


def _milliseconds(function: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    function()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def _matmul_flops(device: torch.device, config: Config) -> float:
    """FLOP/s of a large square matrix product in the compute dtype; the best of ten."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, config.model.dtype)) for _ in range(2))
    best = min(_milliseconds(lambda: a @ b, device) for _ in range(10))
    return 2 * n**3 / (best / 1e3)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_resident_gib(config: Config, method: str, shape: Shape) -> float:
    """Of one update, over what this process held before it loaded the model."""
    before = _resident_gib("VmRSS")
    policy, groups = _load(config, shape, torch.device("cpu"))
    job = _Job(policy, method, groups)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    job.update()
    return _resident_gib("VmHWM") - before


def _resident_gib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak). Not ``ru_maxrss``: in a spawned process that starts from its parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return kib * 1024 / GIB


def _print(rows: list[Row], rate: float, config: Config) -> None:
    first, by_method = rows[0], {row.method: row for row in rows}
    table = Table(
        title=f"{config.model.path}, {config.model.dtype}: P={first.prompt} R={first.completion} G={first.group_size} "
        f"groups={first.groups}, rho {first.rho:.2f}, ratio of FLOPs {first.flop_ratio:.2f}"
    )
    for name in (
        "method",
        "old ms",
        "update ms",
        "MFU old",
        "MFU update",
        "peak GiB",
        "max |d logprob|",
        "update / grouped",
    ):
        table.add_column(name, justify="left" if name == "method" else "right")
    for row in rows:
        ratio = row.update_ms / by_method["grouped"].update_ms
        table.add_row(
            row.method, f"{row.old_ms:.0f}", f"{row.update_ms:.0f}", f"{row.mfu_old:.2f}", f"{row.mfu_update:.2f}",
            f"{row.peak_gib:.2f}", f"{row.max_dlogprob:.1e}", f"{ratio:.2f}",
        )  # fmt: skip
    console = Console()
    console.width = max(console.width, 110)  # a pipe or a narrow terminal must not cut the methods' names
    console.print(table)
    console.print(f"matrix product: {rate / 1e12:.3f} TFLOP/s")


def _report(rows: list[Row], device: torch.device) -> dict[str, object]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"device": name, "versions": versions, "rows": [asdict(row) for row in rows]}
