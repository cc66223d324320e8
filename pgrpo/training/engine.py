"""Builds the engine that samples, and the canary that checks that it has the policy's weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pgrpo.checkpoint.shards import shard_of
from pgrpo.config import Config, ConfigError
from pgrpo.distributed.fsdp import no_gradient
from pgrpo.distributed.world import World
from pgrpo.model.families.expert_products import recorded_choices
from pgrpo.model.families.experts import can_unstack, has_prefix
from pgrpo.model.policy import Policy
from pgrpo.model.recompute import not_compiled
from pgrpo.model.weights import full_weights, weight_names
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.packing.forest import Forest
from pgrpo.placement.awake import engine_memory
from pgrpo.placement.choices import compute_dtype, engine_choice, engine_name
from pgrpo.planning.dims import decoder_layers
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.rollout.base import RolloutEngine
from pgrpo.rollout.embedded.engine import EmbeddedEngine
from pgrpo.rollout.vllm import canary
from pgrpo.rollout.vllm import engine as vllm
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.rollout.vllm.builds import what_is_built
from pgrpo.rollout.vllm.images import EngineImages
from pgrpo.rollout.vllm.offload import Offload
from pgrpo.training.offload import MOMENTS
from pgrpo.types import Group, Sample
from pgrpo.vision.families import never_sampled

log = logging.getLogger(__name__)
VLLM_KEYS = (
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "offload_policy",
    "sleep",
    "enforce_eager",
    "shared_decode",
    "canary_every",
    "compare_experts",
    "vllm_deadline_s",
    "allow_untested_vllm",
)


def check_engine(config: Config, dims: ModelDims, world: World) -> None:
    """Refuse an engine that cannot run as configured. Runs before weights are loaded.

    Raises:
        ConfigError: with the key and what to do.
    """
    rollout, choice = config.rollout, engine_choice(config, world.device)
    if choice.name == "embedded":
        if world.device.type == "cuda" and rollout.engine == "auto" and world.is_main:
            log.warning("rollout.engine=auto: %s", choice.text)
        for key in VLLM_KEYS:
            if (value := getattr(rollout, key)) != getattr(type(rollout)(), key):
                raise ConfigError(
                    f"rollout.{key}: {value} has no effect on the embedded engine, which is what rollout.engine={rollout.engine} "
                    "takes here; leave it out, or set rollout.engine=vllm"
                )
        return
    if not vllm_start.is_installed():
        raise ConfigError(
            "rollout.engine=vllm: vLLM is not installed: pip install -e '.[vllm]', or set rollout.engine=embedded"
        )
    check_sharers(config, dims, world.size)
    if rollout.compare_experts and (lacks := _cannot_compare_experts(config, dims, world)):
        raise ConfigError(f"rollout.compare_experts: true: {lacks}; leave it out")
    vllm_start.check_version(config, world.device)
    engine_memory(config, dims, world)  # refuses what does not fit


def check_sharers(config: Config, dims: ModelDims, ranks: int) -> None:
    """Refuse a number of ranks that cannot share a vLLM engine, with the numbers that can (``ConfigError``)."""
    size, key, why = config.tensor_parallel_size, "rollout.tensor_parallel_size", ""
    if size > config.rollout.tensor_parallel_size:
        key, why = "model.sequence_parallel_size", ", as these ranks share a vLLM engine"
    counts = [("ranks", ranks), ("attention heads", dims.heads), ("key/value heads", dims.kv_heads)]
    counts += [("attention heads of some layers", heads) for heads in dims.other_heads]
    for what, count in counts:
        if count % size:
            valid = [str(n) for n in range(1, ranks + 1) if not any(each % n for _, each in counts)]
            raise ConfigError(f"{key}: {size} does not divide {count} {what}; it may be {', '.join(valid)}{why}")


def _cannot_compare_experts(config: Config, dims: ModelDims, world: World) -> str:
    """Why choices of experts cannot be compared; empty if they can."""
    if not dims.stacked:
        return f"{config.model.path} has no experts that transformers stacks"
    if not config.rollout.canary_every:
        return "the canary compares them, and rollout.canary_every=0 is off"
    if config.model.sequence_parallel_size > 1:
        return "with model.sequence_parallel_size no rank has all rows of a sample"
    if world.device.type == "cpu":
        return "vLLM does not tell its choices on a CPU"
    return ""


def check_pushable(config: Config, hf_config: PretrainedConfig, world: World) -> None:
    """Refuse vLLM for a model that transformers holds in other tensors than its checkpoint has, unless these are stacked experts,
    which a push takes apart; and for one of which it builds more than the policy has (a model with images, as text only), unless
    transformers can say what the language model's tensors are called there.

    Raises:
        ConfigError: with the key and what to do.
    """
    if engine_name(config, world.device) == "vllm" and not can_unstack(hf_config):
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: transformers holds a {hf_config.model_type} model in other tensors than its "
            "checkpoint, which vLLM loads, so that weights cannot be pushed; set rollout.engine=embedded"
        )
    theirs, ours = (hf_config.architectures or [None])[0], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    whole = "ForConditionalGeneration"
    builds_more = ours and whole not in ours and whole in (theirs or "")
    if engine_name(config, world.device) == "vllm" and builds_more and not has_prefix(hf_config):
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: of this config.json vLLM builds a {theirs}, which has parts that the policy, "
            f"a {ours}, does not have; set rollout.engine=embedded, or give model.path a folder of the language model alone"
        )


def check_built(config: Config, hf_config: PretrainedConfig, world: World) -> str:
    """What vLLM builds of the model, in words; nothing where it does not sample.

    Raises:
        ConfigError: it does not know the model.
    """
    return what_is_built(config, hf_config) if engine_name(config, world.device) == "vllm" else ""


def build_engine(
    config: Config,
    world: World,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    eos_token_ids: Sequence[int],
    images: EngineImages | None = None,
) -> RolloutEngine:
    """The configured engine, which ``check_engine`` accepted. A collective call. ``images``: of the data, for vLLM.

    Raises:
        ConfigError: the policy leaves too little memory for vLLM.
    """
    if engine_name(config, world.device) == "embedded":
        return EmbeddedEngine(
            policy,
            tokenizer,
            eos_token_ids,
            max_concurrent=config.rollout.max_concurrent,
            any_rank=world.any,
            check_stop=world.check_stop,
        )
    memory, sleeps, _ = engine_memory(config, ModelDims.from_config(policy.model.config), world)
    return vllm.VLLMEngine(
        config,
        world,
        tokenizer,
        eos_token_ids,
        partial(full_weights, policy.model, compute_dtype(config)),
        weight_names(policy.model),
        memory_share=memory.share,
        sleeps=sleeps,
        offload=Offload(lambda: resting_tensors(policy, optimizer, memory.offloaded), memory.staying_gib * GIB),
        images=images,
        banned=never_sampled(policy.model.config),
    )


def resting_tensors(policy: nn.Module, optimizer: torch.optim.Optimizer, parts: Container[str]) -> Iterator[Tensor]:
    """This rank's shards of ``weights`` and of AdamW's ``moments``: those of them that are in ``parts``."""
    for parameter in policy.parameters():
        if "weights" in parts:
            yield shard_of(parameter).tensor
        state = optimizer.state.get(parameter)
        if state and "moments" in parts:
            yield from (shard_of(state[name]).tensor for name in MOMENTS)


class ScoringEngine(Protocol):
    """The part of ``VLLMEngine`` that the canary needs."""

    def score(self, samples: Sequence[Sample]) -> vllm.Scores: ...


class Canary:
    """Compares the change of the policy's log-probs by an update with the change of the engine's.

    Args:
        every: steps between two checks, beginning with the first step.
        most_tokens: the most tokens of a completion that are scored.
        compare_experts: also compares which experts the two choose. Not with sequence parallelism.
    """

    def __init__(
        self,
        world: World,
        policy: Policy,
        engine: ScoringEngine,
        every: int,
        most_tokens: int,
        *,
        compare_experts: bool,
    ) -> None:
        self.world, self.policy, self.engine = world, policy, engine
        self.every, self.most_tokens, self.compare_experts = every, most_tokens, compare_experts
        self._samples: list[Sample] = []
        self._old: list[float] = []
        self._new: list[float] | None = None
        self._experts: list[Tensor | None] = []

    def before_update(self, step: int, groups: Sequence[Group]) -> None:
        """Record some of the step's samples and their log-probs. ``groups`` are rank 0's. A collective call."""
        self._samples, self._new = [], None
        if step % self.every == 0:
            self._samples = self.world.from_main(canary.pick(groups, self.most_tokens))
            self._old = self._logprobs()

    def after_update(self) -> None:
        """Record the log-probs of these samples again. A collective call."""
        if self._samples:
            self._new = self._logprobs(record=self.compare_experts)

    def look(self) -> dict[str, float]:
        """Score these samples with the engine, which is awake with the new weights, and compare. Returns metrics, if there was an
        update to check.

        Raises:
            CanaryError: the engine has other weights. ``RankFailed``: another rank's engine has.
        """
        if self._new is None:
            return {}
        lengths = [len(sample.token_ids) for sample in self._samples]
        scores = self.engine.score(self._samples)
        slope = canary.regress(self._old, self._new, scores.logprobs, lengths)
        self._new = None
        self.world.together(lambda: canary.check(slope))
        metrics = {"canary/logp_difference": slope.noise}
        if math.isfinite(slope.error):
            metrics |= {"canary/slope": slope.slope, "canary/slope_error": slope.error}
        if scores.experts is not None:
            metrics["canary/expert_difference"] = canary.other_experts(self._experts, scores.experts)
        return metrics

    def _logprobs(self, *, record: bool = False) -> list[float]:
        """Log-probs of the samples' completion tokens. ``record``: keep the experts of the rows that predict these."""
        batch = build_batch(Forest.of(self._samples), device=self.world.device, attention=self.policy.attention)
        with no_gradient(self.policy), not_compiled(), recorded_choices() if record else nullcontext(()) as choices:
            found = self.policy(batch, temperature=1.0).logprobs.tolist()
        if record:
            self._experts = self._of_layers(choices, batch)
        return found

    def _of_layers(self, choices: Iterable[tuple[nn.Module, Tensor]], batch: GroupedBatch) -> list[Tensor | None]:
        """[A, experts] of each layer: what its experts' calls chose for the rows that predict; None of a layer without experts."""
        calls: dict[nn.Module, list[Tensor]] = {}  # in order: with ``mlp_chunks`` one for each part of the rows
        for module, experts in choices:
            calls.setdefault(module, []).append(experts)
        of_module = {module: torch.cat(parts) for module, parts in calls.items()}
        rows = batch.packed_tokens
        if wrong := [len(experts) for experts in of_module.values() if len(experts) != rows]:
            raise RuntimeError(
                f"the canary saw experts of {wrong[0]} rows of a batch of {rows}: set rollout.compare_experts=false"
            )
        chosen = {module: experts.index_select(0, batch.logit_index).cpu() for module, experts in of_module.items()}
        layers = decoder_layers(self.policy.model)
        return [next((chosen[m] for m in layer.modules() if m in chosen), None) for layer in layers]


def build_canary(config: Config, world: World, policy: Policy, engine: RolloutEngine) -> Canary | None:
    """The canary; None if it is off, for the embedded engine, which has no weights of its own, and for completions of one token."""
    most_tokens = min(canary.TOKENS, config.max_sampled_tokens - 1)  # vLLM samples one more to score
    if not config.rollout.canary_every or not most_tokens or not isinstance(engine, vllm.VLLMEngine):
        return None
    return Canary(
        world, policy, engine, config.rollout.canary_every, most_tokens, compare_experts=config.rollout.compare_experts
    )
