"""Sampling with vLLM inside the trainer's processes: one engine per rank, or one shared by ``tensor_parallel_size`` neighbouring
ranks.

The engine loads no weights from disk: before every rollout it receives all of the policy's. While the policy trains it sleeps, or
keeps its memory where there is room for both.

This file depends on these internals of vLLM, for the releases in ``vllm_start.TESTED`` (``vllm_start`` and ``loading`` list
their own):
- A request without a seed draws from this process's global generators (PyTorch, NumPy, Python).
- ``LLM.generate`` consists of ``LLM.enqueue``, ``llm_engine.step`` and ``abort_request``. ``LLM.request_counter`` numbers the
  requests, and ``enqueue`` returns their internal names. A completion includes the eos that ended it.
- Shutting the engine down destroys the process group. The engine also shuts itself down at exit.
- Sleep level 2 frees the weights, keys and values; ``wake_up`` allocates them again by tag. PyTorch counts them as allocated in
  either state. Only one engine per process can sleep, and none on a CPU.
- Without sleep mode the keys and values of the weights before stay in the cache until ``reset_prefix_cache``, which a push calls
  (``loading``), and features of images until ``reset_encoder_cache``. Sleep mode's allocator is not there; all memory is PyTorch's
  own, so that updates and prefills reuse each other's cached blocks.
- The scheduler's ``schedule`` returns the ids of the requests that it preempted (``preempted_req_ids``).
"""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pgrpo.config import Config
from pgrpo.distributed.world import World
from pgrpo.process.deadline import deadline
from pgrpo.rollout.base import More, OnFinished, Wait, no_more
from pgrpo.rollout.text import Tokenizer, make_completions
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.rollout.vllm.images import EngineImages, as_prompt, check_expanded, wait_for_room
from pgrpo.rollout.vllm.loading import load, shape_logits
from pgrpo.rollout.vllm.offload import Offload
from pgrpo.rollout.vllm.requests import DEADLINE, Asked, EngineError, Requests, vllm_errors
from pgrpo.rollout.vllm.scores import Scores, read_scores
from pgrpo.rollout.vllm.sharing import Sharers
from pgrpo.types import Completion, Request, Sample, SamplingParams

TAGS = ("weights", "kv_cache")
"""Parts of vLLM's memory that wake one by one, and fall asleep together."""


class VLLMEngine:
    """A ``RolloutEngine`` on vLLM. All ranks must construct it and call its methods together.

    Args:
        config: the run's config.
        world: this process among the ranks.
        tokenizer: decodes token ids to the text that rewards see.
        eos_token_ids: tokens that end a completion.
        weights: yields (Hugging Face name, unsharded tensor in the compute dtype) for every current weight of the policy.
            A collective call.
        weight_names: all names that ``weights`` must yield.
        memory_share: fraction of the GPU's memory for weights, keys and values (vLLM's ``gpu_memory_utilization``).
        sleeps: free that memory outside of ``awake``; a CPU's engine keeps it.
        offload: tensors whose GPU memory vLLM may use from a push to the end of the rollout.
        images: of a model with a vision tower.
        banned: ids that are never sampled and have no probability, as in the trainer.

    Raises:
        ConfigError: the installed version of vLLM is not supported.
        EngineError: vLLM failed to start with this config.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        tokenizer: Tokenizer,
        eos_token_ids: Sequence[int],
        weights: Callable[[], Iterator[tuple[str, Tensor]]],
        weight_names: set[str],
        *,
        memory_share: float,
        sleeps: bool = True,
        offload: Offload | None = None,
        images: EngineImages | None = None,
        banned: Sequence[int] = (),
    ) -> None:
        self.world, self.tokenizer, self.eos_token_ids = world, tokenizer, sorted(eos_token_ids)
        self.weights, self.weight_names = weights, weight_names
        self.seconds, self.compares_experts = config.rollout.vllm_deadline_s, config.rollout.compare_experts
        self.on_gpu = world.device.type == "cuda"
        self.sleeps = self.on_gpu and sleeps
        self.max_model_len = config.max_sample_tokens
        self.is_awake = False
        self.asleep = set(TAGS)
        self.divisor = 1.0
        self.metrics: dict[str, float] = {}
        self.offload, self.images = offload or Offload(), images
        vllm_start.prepare(config, world)
        self.sharers = Sharers(world, config.tensor_parallel_size)
        allocated = self._allocated()
        with self.offload.away():  # vLLM refuses a share of memory that is not free when it starts
            self.llm, self.notes = vllm_start.start(config, world, memory_share, images, sleeps=self.sleeps)
            self.requests = Requests(self.llm, self.seconds, self.sharers.stop_signal)
            shape_logits(self._model(), lambda: self.divisor, banned)
            if images is not None:
                wait_for_room(self.llm.llm_engine.engine_core.engine_core.scheduler)
            self._fall_asleep()
        gc.collect()  # what the start left is not the engine's
        self.counted_bytes = self._allocated() - allocated

    @contextmanager
    def awake(self, version: int) -> Iterator[None]:
        """Wake the engine and push the policy's current weights: inside this block ``sample`` and ``score`` use them."""
        self.weights_version = version
        waking, preemptions = self._wake("weights"), self.requests.preemptions

        def push() -> None:
            started = time.perf_counter()
            self.push()
            if self.on_gpu:  # not for the policy's copy to the host, which is on another stream
                torch.cuda.current_stream(self.world.device).synchronize()
            self.metrics["time/weight_sync"] = time.perf_counter() - started

        with self.offload.away(meanwhile=push):
            self.metrics["time/wake"] = waking + self._wake("kv_cache")
            self.is_awake = True
            try:
                yield
            except BaseException:
                self.is_awake = False
                # After a device error, sleeping fails too; report the first error.
                with suppress(EngineError):
                    self._fall_asleep()
                raise
            self.is_awake = False
            started = self._now()
            self.sharers.together(self._fall_asleep)
            self.metrics["time/sleep"] = self._now() - started
        self.metrics["time/offload"] = self.offload.seconds
        preempted = torch.tensor(
            [self.requests.preemptions - preemptions], dtype=torch.float64, device=self.world.device
        )
        self.metrics["rollout/preemptions"] = self.world.sum(preempted).item() / (
            self.sharers.size // self.world.sequence_parallel_size
        )

    def sample(
        self, requests: Sequence[Request], params: SamplingParams, on_finished: OnFinished, more: More = no_more
    ) -> None:
        """Sample every request, as one request of vLLM each. Requests of ``more`` join as soon as they arrive, so a rollout with
        such requests is not reproducible.

        The random numbers depend on all seeds of the call together: repeating a call with the same weights gives the same
        completions, but calling with some of its requests may give others.

        Raises:
            EngineError: vLLM failed or aborted a request on this rank.
            RankFailed: the same on another rank.
            Stopped: a stop signal arrived on any rank.
        """
        self.sharers.together(lambda: self._sample(requests, params, on_finished, more))

    def _sample(self, requests: Sequence[Request], params: SamplingParams, on_finished: OnFinished, more: More) -> None:
        shares = self.sharers.shares()
        if shares is not None:  # every rank of a shared engine submits all requests and keeps its own
            if more is no_more:
                requests = shares.gather(requests)
            else:
                more = partial(shares.more, more)
        requests = list(requests) or list(more("any") or ())
        if not requests:  # no episode has a turn
            return
        greedy, group_size = params.temperature == 0.0, len(requests[0].seeds)
        settings: Any = partial(
            vllm_start.package().SamplingParams,
            n=1 if greedy else group_size,  # vLLM refuses n > 1 when greedy: sample once, copy below
            temperature=0.0 if greedy else 1.0,  # shape_logits applies the temperature
            top_p=params.top_p,
            top_k=params.top_k,
            stop=list(params.stop),
            stop_token_ids=self.eos_token_ids,
            skip_special_tokens=not params.keep_special_tokens,  # of the text that stop strings are looked for in
            detokenize=bool(params.stop),  # make_completions decodes the text, once per completion
            logprobs=0,  # the sampled token's only
            flat_logprobs=True,
            output_kind=vllm_start.package().sampling_params.RequestOutputKind.FINAL_ONLY,
        )

        def take(position: int, output: Any) -> None:
            check_expanded(requests[position], output.prompt_token_ids)
            own = position if shares is None else shares.own[position]
            if own is not None:
                completions = self._completions(output, params)
                on_finished(own, completions * group_size if greedy else completions)

        def others(wait: Wait) -> list[Asked]:
            requests.extend(new := more(wait) or ())
            return [self._request(r, params, settings) for r in new]

        self._check_awake()
        self.divisor = 1.0 if greedy else params.temperature
        try:
            seed = _joint_seed([r.seeds for r in requests])
            self.requests.run_all([self._request(r, params, settings) for r in requests], seed, take, others)
        finally:
            self.divisor = 1.0

    def _request(self, request: Request, params: SamplingParams, settings: Callable[..., Any]) -> Asked:
        """The request in vLLM's terms. EngineError if it does not fit."""
        limit = min(request.max_tokens or params.max_completion_tokens, params.max_completion_tokens)
        if len(request.token_ids) + limit > self.max_model_len:
            raise EngineError(
                f"a prompt of {len(request.token_ids)} tokens and a completion of up to {limit} exceed the engine's "
                f"{self.max_model_len} (data.max_prompt_tokens + rollout.max_completion_tokens, or those of an episode)"
            )
        return as_prompt(request, self.images), settings(max_tokens=limit)

    def _completions(self, output: Any, params: SamplingParams) -> list[Completion]:
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        ids = [list(s.token_ids) for s in samples]
        logprobs = [list(s.logprobs.logprobs) for s in samples]
        if [len(i) for i in ids] != [len(p) for p in logprobs]:
            raise EngineError(f"vLLM returned different numbers of tokens and log-probs in request {output.request_id}")
        stopped = [s.finish_reason == "stop" for s in samples]
        return make_completions(
            self.tokenizer, ids, logprobs, stopped, self.eos_token_ids, params, self.weights_version
        )

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Log-probs of samples, and the experts that computed them. Ranks that share an engine must pass the same samples."""
        request = vllm_start.package().SamplingParams(
            max_tokens=1, prompt_logprobs=0, top_p=1.0, temperature=1.0, detokenize=False
        )
        self._check_awake()
        outputs: dict[int, Any] = {}
        asked = [({"prompt_token_ids": sample.prompt_ids + sample.token_ids}, request) for sample in samples]
        self.sharers.together(lambda: self.requests.run(asked, 0, outputs.__setitem__))
        return read_scores([outputs[i] for i in range(len(samples))], samples, with_experts=self.compares_experts)

    def close(self) -> None:
        """Shut the engine down. This destroys the process group, so it must be the last thing that a rank does."""
        if self.sleeps:
            # vLLM's allocator unmaps memory when it is freed, and reports a CUDA error for memory that sleep has already unmapped.
            torch.cuda.empty_cache()
            # A failed push leaves the weights awake, and it reports the same for memory that is woken again.
            if self.asleep:
                with suppress(EngineError):  # no room to wake: those reports do no harm
                    self._call("wake_up", lambda: self.llm.wake_up(tags=sorted(self.asleep)))
        self._call("shutdown", self.llm.llm_engine.engine_core.shutdown)

    def push(self) -> None:
        """Copy the policy's weights into the engine, whose weights must be awake. A collective call.

        Raises:
            DeliveryError, EngineError: not every weight arrived on this rank, or they sleep.
            RankFailed: the same on another rank.
        """
        self.sharers.together(self._push)

    def _push(self) -> None:
        if self.sleeps and "weights" in self.asleep:  # to write there would be an illegal memory access
            raise EngineError("weight push: the engine's weights are asleep: push inside awake()")
        load(
            self.llm, self._model(), self.weights(), self.weight_names, self._call,
            is_packed=not self.on_gpu, ranks=self.sharers.size, rank=self.sharers.rank,
            sum_over_ranks=self.sharers.sum,
        )  # fmt: skip
        if self.images is not None:
            self.llm.llm_engine.reset_encoder_cache()  # its features are those of the tower before this push

    def _check_awake(self) -> None:
        if not self.is_awake:
            raise EngineError("the engine is asleep: call sample and score inside awake()")

    def _model(self) -> Any:
        return self.llm.apply_model(lambda model: model)[0]

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.world.device) if self.on_gpu else 0

    def _now(self) -> float:
        self.world.synchronize()
        return time.perf_counter()

    def _wake(self, tag: str) -> float:
        """Allocate the engine's memory that has this tag, if it sleeps. Returns seconds."""

        def wake() -> None:
            if self.sleeps:
                torch.cuda.empty_cache()  # the trainer's allocator gives its cached blocks back
                self._call("wake_up", lambda: self.llm.wake_up(tags=[tag]))
                self.asleep.discard(tag)

        started = self._now()
        self.sharers.together(wake)
        return self._now() - started

    def _fall_asleep(self) -> None:
        if self.sleeps:
            self._call("sleep", lambda: self.llm.sleep(level=2))
            self.asleep = set(TAGS)

    def _call(self, what: str, function: Callable[[], Any]) -> Any:
        with deadline(self.seconds, f"vLLM's {what}", DEADLINE), vllm_errors(what):
            return function()


def _joint_seed(seeds: Sequence[Sequence[int]]) -> int:
    """A 63-bit hash of all seeds."""
    key = repr([list(group) for group in seeds]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
