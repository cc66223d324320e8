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

    def run_all(self, prompts: list[list[int]], request: Any, seed: int) -> list[Any]:
        """``run``, again for the prompts of which vLLM gave a completion up: a part of one must not be scored.

        Raises:
            EngineError: it gave one up ``RETRIES`` times.
        """
        outputs: dict[int, Any] = {}
        text = ""
        for attempt in range(1 + RETRIES):
            if attempt:
                log.warning("%s: they are sampled again", text)
            left = [i for i in range(len(prompts)) if i not in outputs]
            found = dict(zip(left, self.run([prompts[i] for i in left], request, seed + attempt), strict=True))
            reasons = {i: {str(s.finish_reason) for s in o.outputs} - {"stop", "length"} for i, o in found.items()}
            outputs |= {i: output for i, output in found.items() if not reasons[i]}
            if len(outputs) == len(prompts):
                return [outputs[i] for i in range(len(prompts))]
            given = ", ".join(sorted(set().union(*reasons.values())))
            text = f"vLLM gave up completions of {len(prompts) - len(outputs)} of {len(prompts)} prompts ({given})"
        raise EngineError(f"{text}, {1 + RETRIES} times in a row")

    def run(self, prompts: list[list[int]], request: Any, seed: int) -> list[Any]:
        """Finished outputs of the prompts, in order."""
        state = rng_state()
        seed_all(seed)
        finished: list[Any] = []
        steps = 0
        with deadline(self.seconds, "a vLLM rollout", DEADLINE), vllm_errors("rollout"):
            ids = self.llm.enqueue([{"prompt_token_ids": p} for p in prompts], request, use_tqdm=False)
            engine = self.llm.llm_engine
            try:
                while engine.has_unfinished_requests():
                    if signum := self.stop_signal(steps := steps + 1):
                        raise Stopped(signum)
                    finished += [output for output in engine.step() if output.finished]
            except BaseException:
                with suppress(Exception):  # it may fail in this too, and the first error is the one to tell
                    engine.abort_request(ids, internal=True)
                raise
            finally:
                set_rng_state(state)
        if len(finished) != len(ids):
            raise EngineError(f"vLLM finished {len(finished)} of {len(ids)} requests")
        return sorted(finished, key=lambda output: int(output.request_id))


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
