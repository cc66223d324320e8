"""Runs requests on a vLLM engine in this process, step by step. Retries requests that vLLM aborts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch

from pgrpo.config import ConfigError
from pgrpo.process.deadline import deadline
from pgrpo.process.rng import rng_state, seed_all, set_rng_state
from pgrpo.process.stopping import Stopped
from pgrpo.rollout.base import Wait
from pgrpo.rollout.vllm.delivery import DeliveryError

DEADLINE = "rollout.vllm_deadline_s"
RETRIES = 2
"""Number of times that a prompt is sampled again if vLLM aborts its completions."""
PORTION = 2**17
"""Tokens of prompts, counted once a completion, that vLLM is given between two steps. It hashes them on the CPU, which takes 0.14 s
for 2^20: all but the first portion while the GPU computes the one before."""
Asked = tuple[dict[str, Any], Any]
"""A prompt as vLLM takes it (``prompt_token_ids``, and images), and vLLM's ``SamplingParams``."""
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

    def run_all(
        self, asked: Sequence[Asked], seed: int, on_output: OnOutput, more: Callable[[Wait], Sequence[Asked]]
    ) -> None:
        """``run``, and again for requests with a completion that vLLM aborted, as a partial completion must not be scored. They
        are sampled again at once, with those of ``more``.

        Raises:
            EngineError: a request was still aborted after ``RETRIES`` retries.
        """
        requests = list(asked)  # by position
        places = list(range(len(requests)))  # the position of each of vLLM's
        aborted: list[int] = []
        tries: Counter[int] = Counter()

        def take(place: int, output: Any) -> None:
            position = places[place]
            if not (reasons := {str(sample.finish_reason) for sample in output.outputs} - {"stop", "length"}):
                on_output(position, output)
                return
            tries[position] += 1
            text = (
                f"vLLM gave up a completion of prompt {position + 1} of {len(requests)} ({', '.join(sorted(reasons))})"
            )
            if tries[position] > RETRIES:
                raise EngineError(f"{text}, {1 + RETRIES} times in a row")
            log.warning("%s: it is sampled again", text)
            aborted.append(position)

        def others(wait: Wait) -> list[Asked]:
            again, aborted[:] = list(aborted), []
            new = more("no" if again else wait)
            places.extend([*again, *range(len(requests), len(requests) + len(new))])
            requests.extend(new)
            return [requests[position] for position in again] + list(new)

        self.run(asked, seed, take, others)

    def run(
        self,
        asked: Sequence[Asked],
        seed: int,
        on_output: OnOutput,
        more: Callable[[Wait], Sequence[Asked]] = lambda _: (),
    ) -> None:
        """Call ``on_output`` with each request's position and output as soon as it is finished. ``more`` gives further requests,
        once vLLM has all that are ``asked``; none, when nothing is left to sample, is the end."""
        state = rng_state()
        seed_all(seed)
        steps = finished = given = 0
        with deadline(self.seconds, "a vLLM rollout", DEADLINE), vllm_errors("rollout"):
            first = self.llm.request_counter.counter
            engine, ids = self.llm.llm_engine, []

            def enqueue(requests: Sequence[Asked]) -> bool:
                for prompt, settings in requests:
                    ids.extend(self.llm.enqueue([prompt], settings, use_tqdm=False))
                return bool(requests)

            try:
                while given < len(asked) or engine.has_unfinished_requests() or enqueue(more("any")):
                    if signum := self.stop_signal(steps := steps + 1):
                        raise Stopped(signum)
                    tokens = 0
                    while given < len(asked) and tokens < PORTION:
                        prompt, settings = asked[given]
                        tokens += len(prompt["prompt_token_ids"]) * settings.n
                        enqueue(asked[given : given + 1])
                        given += 1
                    if given == len(asked):
                        enqueue(more("no"))
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
