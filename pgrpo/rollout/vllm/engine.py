"""Sampling with vLLM in the trainer's own processes: one engine a rank, or one over ``tensor_parallel_size`` neighbouring ranks.

The engine sleeps while the policy trains. It has no weights of its own: each time it wakes, all of the policy's are pushed.

What this file knows of vLLM's insides, on the versions in ``vllm_start.SUPPORTED`` (of its start: ``vllm_start``):
- Without a seed of its own a request draws from this process's generators (PyTorch, NumPy, Python).
- ``LLM.enqueue``, ``llm_engine.step`` and ``abort_request`` are what ``LLM.generate`` is made of; requests are counted up by
  ``LLM.request_counter``, and ``enqueue`` returns them under internal names. The eos that ended a completion is one of its tokens.
- The engine destroys the process group when it is shut down, and shuts itself down at exit if nobody did.
- Sleep level 2 gives up weights and keys and values, and ``wake_up`` takes them back by tag; PyTorch counts them as allocated
  all the while. Only one engine in a process can sleep. A CPU has no sleep.
- The worker's ``reload_weights`` calls the model's ``load_weights`` once, with Hugging Face names, which returns the names of its
  own parameters that it wrote; one that it did not write is only warned of. ``packed_modules_mapping`` says which are fused.
- Its runners get logits from the model's ``compute_logits``, outside of CUDA graphs, for sampling and for prompt log-probs.
- On a CPU a linear layer's weight is packed away after loading, and cannot be read back; a head that is tied to the embedding
  is packed once, and a reload leaves that copy as it was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pgrpo.config import Config
from pgrpo.distributed.world import World
from pgrpo.packing.forest import Tree
from pgrpo.process.deadline import deadline
from pgrpo.process.stopping import Stopped
from pgrpo.rollout.base import OnFinished
from pgrpo.rollout.text import Tokenizer, make_completions
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.rollout.vllm.delivery import Delivery
from pgrpo.rollout.vllm.requests import DEADLINE, EngineError, Requests, vllm_errors
from pgrpo.types import Completion, Request, SamplingParams

T = TypeVar("T")
CHECK_EVERY = 16
"""Decoding steps between looks at the stop signal, where ranks that share an engine exchange it."""


class VLLMEngine:
    """A ``RolloutEngine`` on vLLM, asleep after construction. Every rank constructs it and calls its methods alike.

    Args:
        config: of the run.
        world: this process among the ranks.
        tokenizer: turns ids into text for rewards.
        eos_token_ids: tokens that end a completion.
        weights: yields (Hugging Face name, whole tensor in the compute dtype) of the policy now; a collective call.
        weight_names: all names that ``weights`` must yield.
        memory_share: of the GPU's memory, for weights, keys and values (vLLM's ``gpu_memory_utilization``).

    Raises:
        ConfigError: vLLM is of an untested version.
        EngineError: it cannot be started as configured.
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
    ) -> None:
        self.world, self.tokenizer, self.eos_token_ids = world, tokenizer, sorted(eos_token_ids)
        self.weights, self.weight_names = weights, weight_names
        self.seconds = config.rollout.vllm_deadline_s
        self.sleeps = world.device.type == "cuda"
        self.max_model_len = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
        self.is_awake = False
        self.divisor = 1.0
        self.timings: dict[str, float] = {}
        vllm_start.prepare(config, world)
        # The ranks that share an engine: one group for tensors, and one for objects, which must take no GPU memory from vLLM.
        self.tp_size, self.tp_group, self.tp_control = config.rollout.tensor_parallel_size, None, None
        for first in range(0, world.size if self.tp_size > 1 else 0, self.tp_size):
            ranks = list(range(first, first + self.tp_size))
            groups = dist.new_group(ranks), dist.new_group(ranks, backend="gloo")  # collective calls of all ranks
            if world.rank in ranks:
                self.tp_group, self.tp_control = groups
        allocated = self._allocated()
        self.llm = vllm_start.start(config, memory_share, sleeps=self.sleeps)
        self.requests = Requests(self.llm, self.seconds, self._stop_signal)
        self._divide_logits()
        self._fall_asleep()
        self.counted_bytes = self._allocated() - allocated

    @contextmanager
    def awake(self, version: int) -> Iterator[None]:
        """Inside, ``sample`` and ``score`` run on the policy's weights of the moment of entering."""
        self.weights_version = version
        waking = self._wake("weights")
        started = self._now()
        self.push()
        self.timings["time/weight_sync"] = self._now() - started
        self.timings["time/wake"] = waking + self._wake("kv_cache")
        self.is_awake = True
        try:
            yield
        except BaseException:
            self.is_awake = False
            # After a fault of the device this fails too; the first error is the one to tell.
            with suppress(EngineError):
                self._fall_asleep()
            raise
        self.is_awake = False
        started = self._now()
        self._together(self._fall_asleep)
        self.timings["time/sleep"] = self._now() - started

    def sample(self, requests: Sequence[Request], params: SamplingParams, on_finished: OnFinished) -> None:
        """Sample all requests, each as one of vLLM's. All seeds together decide the random numbers: the same call on the same
        weights samples the same, a part of it need not. A stop signal ends it, on all ranks (``Stopped``).

        Raises:
            EngineError: vLLM failed, or ended a request early; where it is another rank's, ``RankFailed``.
        """
        self._together(lambda: self._sample(requests, params, on_finished))

    def _sample(self, requests: Sequence[Request], params: SamplingParams, on_finished: OnFinished) -> None:
        place, count = 0, len(requests)
        if self.tp_group is not None:  # neighbours run one engine: each takes all of their requests, and keeps its own
            shares: list[Any] = [None] * self.tp_size
            dist.all_gather_object(shares, list(requests), group=self.tp_control)
            place = self.world.rank % self.tp_size * count
            requests = [request for share in shares for request in share]
        for token_ids, _ in requests:
            if len(token_ids) + params.max_completion_tokens > self.max_model_len:
                raise EngineError(
                    f"a prompt of {len(token_ids)} tokens and {params.max_completion_tokens} of its completion do not fit "
                    f"the engine's {self.max_model_len} (data.max_prompt_tokens + rollout.max_completion_tokens)"
                )
        greedy, group_size = params.temperature == 0.0, len(requests[0].seeds)
        request = vllm_start.package().SamplingParams(
            n=1 if greedy else group_size,  # vLLM refuses several greedy samples: they are one, several times
            max_tokens=params.max_completion_tokens,
            temperature=0.0 if greedy else 1.0,  # ours divides the logits, see _divide_logits
            top_p=params.top_p,
            top_k=params.top_k,
            stop=list(params.stop),
            stop_token_ids=self.eos_token_ids,
            detokenize=bool(params.stop),  # text is decoded once, when all is sampled
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            output_kind=vllm_start.package().sampling_params.RequestOutputKind.FINAL_ONLY,
        )

        def take(position: int, output: Any) -> None:
            if place <= position < place + count:
                completions = self._completions(output, params)
                on_finished(position - place, completions * group_size if greedy else completions)

        self._check_awake()
        self.divisor = 1.0 if greedy else params.temperature
        try:
            seed = _joint_seed([r.seeds for r in requests])
            self.requests.run_all([r.token_ids for r in requests], request, seed, take)
        finally:
            self.divisor = 1.0

    def _completions(self, output: Any, params: SamplingParams) -> list[Completion]:
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        ids = [list(s.token_ids) for s in samples]
        logprobs = [list(s.logprobs.logprobs) for s in samples]
        if [len(i) for i in ids] != [len(p) for p in logprobs]:
            raise EngineError(f"vLLM gave other numbers of tokens and of log-probs for request {output.request_id}")
        stopped = [s.finish_reason == "stop" for s in samples]
        return make_completions(self.tokenizer, ids, logprobs, stopped, params.stop, self.weights_version)

    def score(self, trees: Sequence[Tree]) -> list[float]:
        """Log-probs at temperature 1 of all tokens behind prompts, in order: of trees that this rank's engine shares."""
        samples = [(tree.prompt_ids, sample.token_ids) for tree in trees for sample in tree.samples]
        request = vllm_start.package().SamplingParams(
            max_tokens=1, prompt_logprobs=0, top_p=1.0, temperature=1.0, detokenize=False
        )
        self._check_awake()
        outputs: dict[int, Any] = {}
        prompts = [prompt + completion for prompt, completion in samples]
        self._together(lambda: self.requests.run(prompts, request, 0, outputs.__setitem__))
        return [
            outputs[i].prompt_logprobs[at][outputs[i].prompt_token_ids[at]].logprob
            for i, (prompt, completion) in enumerate(samples)
            for at in range(len(prompt), len(prompt) + len(completion))
        ]

    def close(self) -> None:
        """Shut the engine down, and with it the process group: the last thing that a rank does."""
        if self.sleeps:
            # vLLM's allocator unmaps whatever is freed, and reports a CUDA error for each part that sleep has unmapped already.
            torch.cuda.empty_cache()
            with suppress(EngineError):  # without room to wake, those reports are all that is amiss
                self._call("wake_up", self.llm.wake_up)
        self._call("shutdown", self.llm.llm_engine.engine_core.shutdown)

    def push(self) -> None:
        """Give the engine the policy's weights. A collective call.

        Raises:
            DeliveryError, EngineError: not all of them arrived; where it is another rank's, ``RankFailed``.
        """
        self._together(self._push)

    def _push(self) -> None:
        model, written = self._model(), set()
        load_weights, delivery = model.load_weights, Delivery(self.weights())
        sending = iter(delivery)

        def load_and_note(weights: Iterator[tuple[str, Tensor]]) -> set[str]:
            written.update(names := load_weights(weights))
            return names

        model.load_weights = load_and_note
        try:
            self._call(
                "weight push",
                lambda: self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": sending}),
            )
        except Exception:
            for _ in sending:  # other ranks' engines wait for this rank's part of every tensor
                pass
            raise
        finally:
            del model.load_weights
        if not self.sleeps and model.lm_head.weight is model.model.embed_tokens.weight:
            model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
        delivery.check(
            self.weight_names,
            written,
            dict(model.named_parameters()),
            getattr(model, "packed_modules_mapping", {}),
            ranks=self.tp_size,
            sum_over_ranks=self._sum_over_engine,
        )
        self.llm.reset_prefix_cache()

    def _sum_over_engine(self, values: Tensor) -> Tensor:
        if self.tp_group is not None:
            dist.all_reduce(values, group=self.tp_group)
        return values

    def _check_awake(self) -> None:
        if not self.is_awake:
            raise EngineError("the engine sleeps: generate and score belong inside awake()")

    def _stop_signal(self, step: int) -> int:
        """The signal that came, or 0: on this rank or, every few steps, on one that shares the engine: those step alike."""
        if self.tp_group is None:
            return self.world.stop.signum
        if step % CHECK_EVERY:
            return 0
        flag = torch.tensor([self.world.stop.signum], device=self.world.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.tp_group)
        return int(flag.item())

    def _together(self, work: Callable[[], T]) -> T:
        """What a rank's engine does, with an outcome that all ranks learn. Ranks that share an engine are inside of the same call:
        the one that fails there leaves alone, and the launcher ends the others."""
        if self.tp_group is None:
            return self.world.together(work)
        try:
            result = work()
        except Stopped:
            self.world.check_stop()
            raise
        self.world.check_stop()
        return result

    def _divide_logits(self) -> None:
        """Let the model itself apply the temperature, to all requests alike: then its raw log-probs, before top-k and top-p, are of
        the distribution that the trainer's are of."""
        model = self._model()
        compute_logits = model.compute_logits

        def divided(*args: Any, **kwargs: Any) -> Any:
            logits = compute_logits(*args, **kwargs)
            return logits if self.divisor == 1.0 else logits.float() / self.divisor

        model.compute_logits = divided

    def _model(self) -> Any:
        return self.llm.apply_model(lambda model: model)[0]

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.world.device) if self.sleeps else 0

    def _now(self) -> float:
        self.world.synchronize()
        return time.perf_counter()

    def _wake(self, tag: str) -> float:
        """Take that part of the engine's memory back. Returns seconds."""
        started = self._now()
        if self.sleeps:
            torch.cuda.empty_cache()  # what the trainer's allocator keeps without need gives way
            self._together(lambda: self._call("wake_up", lambda: self.llm.wake_up(tags=[tag])))
        return self._now() - started

    def _fall_asleep(self) -> None:
        if self.sleeps:
            self._call("sleep", lambda: self.llm.sleep(level=2))

    def _call(self, what: str, function: Callable[[], Any]) -> Any:
        with deadline(self.seconds, f"vLLM's {what}", DEADLINE), vllm_errors(what):
            return function()


def _joint_seed(seeds: Sequence[Sequence[int]]) -> int:
    """One 63-bit seed that depends on all of them."""
    key = repr([list(group) for group in seeds]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
