"""Requests to a vLLM engine in this process, run step by step: one that fails says so, one that is given up is run again."""

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
"""How often a prompt is sampled again whose completions vLLM gave up."""
OnOutput = Callable[[int, Any], None]
"""Called with a position and vLLM's output."""
log = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """vLLM did not do what was asked of it."""


class Requests:
    """What a vLLM engine is asked.

    Args:
        llm: vLLM's ``LLM``.
        seconds: that a call may take; then the process ends, with a message.
        stop_signal: given the number of steps so far, the signal that came, or 0.
    """

    def __init__(self, llm: Any, seconds: float, stop_signal: Callable[[int], int]) -> None:
        self.llm, self.seconds, self.stop_signal = llm, seconds, stop_signal

    def run_all(self, prompts: list[list[int]], request: Any, seed: int, on_output: OnOutput) -> None:
        """``run``, again for the prompts of which vLLM gave a completion up: a part of one must not be scored.

        Raises:
            EngineError: it gave one up ``RETRIES`` times.
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
        """Call ``on_output`` with each prompt's position and output, as soon as it is finished."""
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
                with suppress(Exception):  # it may fail in this too, and the first error is the one to tell
                    engine.abort_request(ids, internal=True)
                raise
            finally:
                set_rng_state(state)
        if finished != len(ids):
            raise EngineError(f"vLLM finished {finished} of {len(ids)} requests")


@contextmanager
def vllm_errors(what: str) -> Iterator[None]:
    """What vLLM raises, as one error that says where."""
    try:
        yield
    except (ConfigError, DeliveryError, EngineError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        hint = " (here the key is rollout.gpu_memory_utilization)" if "memory" in reason else ""
        raise EngineError(f"vLLM failed in {what}: {type(error).__name__}: {reason}{hint}") from error
