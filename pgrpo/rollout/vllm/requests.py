"""Runs requests on a vLLM engine in this process, step by step. Retries requests that vLLM aborts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from pgrpo.config import ConfigError
from pgrpo.process.deadline import deadline
from pgrpo.process.rng import rng_state, seed_all, set_rng_state
from pgrpo.process.stopping import Stopped
from pgrpo.rollout.vllm.delivery import DeliveryError

DEADLINE = "rollout.vllm_deadline_s"
RETRIES = 2
"""Number of times that a prompt is sampled again if vLLM aborts its completions."""
OnOutput = Callable[[int, Any], None]
"""Called with a prompt's position and vLLM's output for it."""
log = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """vLLM failed, or did not finish a request."""


class Requests:
    """The requests to one vLLM engine.

    Args:
        llm: vLLM's ``LLM``.
        seconds: deadline of a call; then the process ends with a message.
        stop_signal: given the number of steps so far, returns the stop signal that arrived, or 0.

    Attributes:
        preemptions: number of times so far that the scheduler stopped a completion for want of cache, to compute it again later.
    """

    def __init__(self, llm: Any, seconds: float, stop_signal: Callable[[int], int]) -> None:
        self.llm, self.seconds, self.stop_signal = llm, seconds, stop_signal
        self.preemptions = 0
        self._count_preemptions(llm.llm_engine.engine_core.engine_core.scheduler)

    def _count_preemptions(self, scheduler: Any) -> None:
        """vLLM counts them only together with statistics of every request, which cost time in each step."""
        schedule = scheduler.schedule

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.preemptions += len(output.preempted_req_ids or ())
            return output

        scheduler.schedule = counted

    def run_all(self, prompts: list[list[int]], request: Any, seed: int, on_output: OnOutput) -> None:
        """``run``, and again for prompts with a completion that vLLM aborted, as a partial completion must not be scored.

        Raises:
            EngineError: prompts were still aborted after ``RETRIES`` retries.
        """
        waiting, text = list(range(len(prompts))), ""
        for attempt in range(1 + RETRIES):
            if attempt:
                log.warning("%s: they are sampled again", text)
            given_up: dict[int, set[str]] = {}

            def take(
                place: int, output: Any, asked: list[int] = waiting, given_up: dict[int, set[str]] = given_up
            ) -> None:
                if reasons := {str(sample.finish_reason) for sample in output.outputs} - {"stop", "length"}:
                    given_up[asked[place]] = reasons
                else:
                    on_output(asked[place], output)

            self.run([prompts[i] for i in waiting], request, seed + attempt, take)
            waiting = sorted(given_up)
            if not waiting:
                return
            reasons = ", ".join(sorted(set().union(*given_up.values())))
            text = f"vLLM gave up completions of {len(waiting)} of {len(prompts)} prompts ({reasons})"
        raise EngineError(f"{text}, {1 + RETRIES} times in a row")

    def run(self, prompts: list[list[int]], request: Any, seed: int, on_output: OnOutput) -> None:
        """Call ``on_output`` with each prompt's position and output as soon as it is finished."""
        state = rng_state()
        seed_all(seed)
        steps = finished = 0
        with deadline(self.seconds, "a vLLM rollout", DEADLINE), vllm_errors("rollout"):
            first = self.llm.request_counter.counter
            ids = self.llm.enqueue([{"prompt_token_ids": p} for p in prompts], request, use_tqdm=False)
            engine = self.llm.llm_engine
            try:
                while engine.has_unfinished_requests():
                    if signum := self.stop_signal(steps := steps + 1):
                        raise Stopped(signum)
                    for output in engine.step():
                        if output.finished:
                            on_output(int(output.request_id) - first, output)
                            finished += 1
            except BaseException:
                with suppress(Exception):  # aborting may fail too; raise the first error
                    engine.abort_request(ids, internal=True)
                raise
            finally:
                set_rng_state(state)
        if finished != len(ids):
            raise EngineError(f"vLLM finished {finished} of {len(ids)} requests")


@contextmanager
def vllm_errors(what: str) -> Iterator[None]:
    """Turn errors of vLLM into an ``EngineError`` that names the call."""
    try:
        yield
    except (ConfigError, DeliveryError, EngineError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        hint = " (here the key is rollout.gpu_memory_utilization)" if "memory" in reason else ""
        raise EngineError(f"vLLM failed in {what}: {type(error).__name__}: {reason}{hint}") from error
