"""Messages of a run: its summary, advice when memory runs out, and the dump of a batch whose loss is not finite."""

from __future__ import annotations

import json
import resource
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pgrpo.config import REDACTED, Config, redact, to_json
from pgrpo.placement.awake import vllm_text
from pgrpo.placement.choices import engine_choice, engine_name
from pgrpo.placement.sizes import most_rows
from pgrpo.planning.flops import GIB, peak_flops
from pgrpo.process.lock import run_folder
from pgrpo.tracking.live import duration
from pgrpo.tracking.record import replacing
from pgrpo.training.build import Parts
from pgrpo.training.progress import Progress
from pgrpo.training.update import NonFiniteError
from pgrpo.types import Group


def summary(parts: Parts, folder: Path) -> str:
    """The line that a run logs when it starts."""
    config, world, policy = parts.config, parts.world, parts.policy
    total = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    parameters = f"{total / 1e6:.1f}M parameters" + (f" ({trained / 1e6:.2f}M trained)" if trained < total else "")
    share = ""
    if engine_name(config, world.device) == "vllm":  # a value to start from, for who wants to set it
        share = f" with {vllm_text(config, parts.learner.dims, world)}"
    return (
        f"{config.model.path}: {parameters}, {config.model.attention} attention on the "
        f"{policy.attention.kernel} kernel ({policy.attention.reason}), "
        f"{engine_choice(config, world.device).text}{share}, "
        f"{config.rollout.prompts_per_step} prompts x {config.rollout.group_size} completions a step, "
        f"{world.size} x {world.device.type}, {len(parts.stream)} prompts, run folder {folder}"
    )


def closing_summary(folder: Path, config: Config, step: int, steps: int, seconds: float) -> str:
    """The lines that a run ends with after ``step``, from the folder's metrics. This process did ``steps``, in ``seconds``."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    earlier = f" (the first {step - steps} by an earlier process)" if steps < step else ""
    lines = [f"done: {step} steps{earlier}; {duration(seconds)}; saved in {folder}"]
    rewards = [row["reward"] for row in rows if row.get("reward") is not None]
    if rewards:
        few = max(1, min(10, len(rewards) // 2))
        first, last = (sum(part) / few for part in (rewards[:few], rewards[-few:]))
        lines.append(f"reward: {first:.4g} in the first {few} step(s), {last:.4g} in the last")
    name = config.checkpoint.keep_best or "eval/reward"
    if evaluated := [row for row in rows if row.get(name) is not None]:
        best, last = max(evaluated, key=lambda row: row[name]), evaluated[-1]
        lines.append(
            f"{name}: best {best[name]:.4g} after step {best['step']}, last {last[name]:.4g} after step {last['step']}"
        )
    where = shlex.quote(str(folder))
    return "\n".join([*lines, f"next: pgrpo plot {where}, and pgrpo export {where} FOLDER"])


def out_of_memory(error: Exception, parts: Parts, progress: Progress) -> RuntimeError | None:
    """An error with the sizes of a step or an evaluation and the keys that lower them; None if memory is not the reason."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
        return None
    config, dims = parts.config, parts.learner.dims
    reason = str(error).strip().splitlines()[0] if str(error) else "no more memory"
    decoded = (
        f"rollout.max_concurrent={config.rollout.max_concurrent} completions of up to "
        f"{config.max_sampled_tokens} tokens are decoded at once"
    )
    lower = "rollout.max_concurrent"
    if engine_name(config, parts.world.device) == "vllm":
        lower += " or rollout.gpu_memory_utilization"
    if progress.unlogged is not None:  # metrics wait for an evaluation
        return RuntimeError(
            f"out of memory in the evaluation after step {progress.step} ({reason}): {decoded}. Lower {lower}"
        )
    rows, longest, budget = most_rows(config), config.max_sample_tokens, config.train.token_budget
    step = "a whole step, " if rows < budget else ""
    less = f"train.token_budget (below {rows}, at least {longest}, the longest sample)"
    heavier = {"full": "offload", "offload": ""}.get(config.model.activation_checkpointing, "full")
    fixes = [f"lower {less}"] if rows > longest else []
    fixes += [f"set model.activation_checkpointing={heavier}"] if heavier else []
    advice = ", ".join([*fixes, f"{'or ' if fixes else ''}lower {lower}"])
    return RuntimeError(
        f"out of memory in step {progress.step + 1} ({reason}). "
        f"A micro-batch has up to {rows} packed tokens ({step}train.token_budget={budget}) in {dims.layers} layers of "
        f"{dims.hidden}, with model.activation_checkpointing={config.model.activation_checkpointing}; {decoded}. "
        f"{advice[0].upper()}{advice[1:]}"
    )


@contextmanager
def naming_the_batch(parts: Parts, progress: Progress, groups: Sequence[Group]) -> Iterator[None]:
    """If the block raises ``NonFiniteError``, write the step's groups to a file and add its name to the message."""
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}; {_dump(parts, progress, groups)}") from None


def _dump(parts: Parts, progress: Progress, groups: Sequence[Group]) -> str:
    """Write all of a step's groups as JSON (with NaN, as Python reads it). Returns the end of a message: the file, or why it
    could not be written, so that the error that led here is still shown.

    Secrets are redacted. Token ids spell them too: a prompt's are left out if its text has a secret, those of an episode and of
    the prompts in front of its samples if the episode's text or messages have one.
    """
    file = run_folder(parts.config) / f"bad_batch_step_{progress.step + 1}.json"
    try:
        if parts.world.is_main:
            rows: list[Any] = redact(list(groups))  # as mappings
            for row in rows:  # token ids spell secrets too
                in_prompt = REDACTED in row["prompt"]["text"]
                if in_prompt:
                    row["prompt"]["token_ids"] = REDACTED
                for episode in row["episodes"]:
                    in_episode = REDACTED in f"{episode['text']}{episode['messages']}"
                    for sample in episode["samples"]:
                        if in_prompt or in_episode:
                            sample["prompt_ids"] = REDACTED
                        if in_episode:
                            sample["token_ids"] = REDACTED
            with replacing(file, "{fix}") as out:
                out.write(to_json(rows, indent=1, skipkeys=True))
    except RuntimeError as error:
        return f"the batch is lost: {error}"
    return f"{file} has the batch"


class StepClock:
    """Measures seconds, FLOPs and memory of one step, from its construction to ``metrics``."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._started = parts, time.perf_counter()
        self._sampled = self._started
        self._reset_peak()

    def sampled(self) -> None:
        """Call this between scoring and the update."""
        self._sampled = time.perf_counter()
        if vision := self._parts.policy.vision:
            vision.flops = 0
        if self._parts.engine.counted_bytes:  # a separate engine's memory in the rollout does not count
            self._reset_peak()

    def metrics(self, updated: dict[str, float]) -> dict[str, float]:
        """Metrics at the end of the step; ``updated`` are those of the updates. A collective call."""
        world = self._parts.world
        world.synchronize()
        done = time.perf_counter()
        flops_per_s = updated["perf/flops"] / (done - self._sampled) / world.size
        # Ranks that compute a batch together have unlike parts of it, some of them no logits.
        peak = torch.tensor([self._peak_memory()], dtype=torch.float64, device=world.device)
        metrics = {
            "perf/tokens_per_s": updated["tokens/packed"] / (done - self._started),
            "perf/tflops": flops_per_s / 1e12,
            "perf/peak_memory_gib": world.max(peak).item(),
            "time/update": done - self._sampled - updated["time/old_logprobs"],
            "time/step": done - self._started,
        }
        if world.device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(world.device))):
            metrics["perf/mfu"] = flops_per_s / peak
        return metrics

    def _reset_peak(self) -> None:
        if self._parts.world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _peak_memory(self) -> float:
        """Peak memory of this rank in GiB: on a GPU of the step, or with vLLM of the update alone; on a CPU of the process."""
        if self._parts.world.device.type == "cuda":
            return (torch.cuda.max_memory_allocated() - self._parts.engine.counted_bytes) / GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
