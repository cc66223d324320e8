"""What a run is made of, how it is built from a config, and how it is saved and restored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pgrpo import checkpoint, distributed
from pgrpo.config import Config, ConfigError, to_yaml
from pgrpo.data import PromptStream, load_prompts
from pgrpo.distributed import World
from pgrpo.flops import ModelDims, update_flops
from pgrpo.lora import LogprobsOf, adapter_parameters, check_lora, without_adapters
from pgrpo.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from pgrpo.policy import Policy, load_hf_config
from pgrpo.rewards.run import RewardRunner
from pgrpo.rng import rng_state, seed_all, set_rng_state
from pgrpo.rollout.base import RolloutEngine
from pgrpo.rollout.embedded import EmbeddedEngine
from pgrpo.training.placement import attention_choice, check_device, place_policy
from pgrpo.training.update import Updater
from pgrpo.types import Group, Prompt

log = logging.getLogger(__name__)


@dataclass
class Run:
    """The pieces of a run. ``step`` counts the steps that are done; ``recent_rewards`` are the mean rewards of the last of them."""

    config: Config
    world: World
    dims: ModelDims
    stream: PromptStream
    held_out: list[Prompt]
    rewards: RewardRunner
    policy: Policy
    engine: RolloutEngine
    updater: Updater
    step: int = 0
    recent_rewards: list[float] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.rewards.close()

    @property
    def run_dir(self) -> Path:
        return run_folder(self.config)

    def save(self, tracker_state: Mapping[str, Any]) -> None:
        """Write ``checkpoints/step_N``, then remove the oldest. A collective call; rank 0 writes."""
        policy, optimizer = self.policy, self.updater.optimizer
        distributed.reshard(policy)  # the last forward may have been an evaluation's
        model = {name: distributed.full_tensor(p) for name, p in _trained(policy).items()}
        moments = optimizer_tensors(optimizer, policy.model)
        generators = self.world.gather([rng_state()])
        reference = self._refreshed_reference()
        if self.world.is_main:
            tensors = {"model": model, "optimizer": moments}
            tensors |= {f"rng_{rank}": state for rank, state in enumerate(generators)}
            tensors |= reference
            scalars = {
                "step": self.step,
                "recent_rewards": self.recent_rewards,
                "stream": self.stream.state_dict(),
                "trackers": dict(tracker_state),
                "config": to_yaml(self.config),
                "world_size": self.world.size,
            }
            root = self.run_dir / "checkpoints"
            checkpoint.save(root, self.step, tensors, scalars)
            checkpoint.prune(root, self.config.checkpoint.keep)
        self.world.barrier()

    def restore(self, resume: str | Path | None) -> dict[str, Any] | None:
        """Go on from a checkpoint (``auto``: this run's newest). Returns the trackers' state; None at a fresh start."""
        root = self.run_dir / "checkpoints"
        path = checkpoint.latest(root) if resume == "auto" else resume and Path(resume)
        if not path:
            return None
        tensors, scalars = checkpoint.load(Path(path))
        _load_parameters(self.policy, tensors["model"])
        load_optimizer_tensors(self.updater.optimizer, self.policy.model, tensors["optimizer"])
        self.stream.load_state_dict(scalars["stream"])
        self.step, self.recent_rewards = scalars["step"], list(scalars.get("recent_rewards", []))
        if "reference" in tensors and isinstance(self.updater.reference, Policy):
            for name, parameter in self.updater.reference.model.named_parameters():
                distributed.copy_full(parameter, tensors["reference"][name])
        if scalars["world_size"] == self.world.size:
            set_rng_state(tensors[f"rng_{self.world.rank}"])
        if self.world.is_main:
            self._report(Path(path), scalars)
        self.world.barrier()
        return scalars["trackers"]

    def _refreshed_reference(self) -> dict[str, dict[str, torch.Tensor]]:
        """The reference's weights where they are no longer the initial ones. A collective call."""
        reference = self.updater.reference
        if not self.config.loss.ref_refresh_every or not isinstance(reference, Policy):
            return {}
        distributed.reshard(reference)
        return {"reference": {n: distributed.full_tensor(p) for n, p in reference.model.named_parameters()}}

    def _report(self, path: Path, scalars: Mapping[str, Any]) -> None:
        log.warning("going on from %s: %d of %d steps done", path, self.step, self.config.train.steps)
        if scalars["world_size"] != self.world.size:
            log.warning("saved on %d ranks, going on with %d", scalars["world_size"], self.world.size)
        before, now = scalars["config"].splitlines(), to_yaml(self.config).splitlines()
        for line in sorted(set(now) - set(before)):
            log.warning("config differs from the checkpoint's: now %s", line.strip())


def run_folder(config: Config) -> Path:
    return Path(config.run_dir).expanduser()


def build_run(
    config: Config,
    world: World,
    rewards: Sequence[Callable[..., Any]] = (),
    dataset: Iterable[Mapping[str, Any]] | None = None,
) -> Run:
    """Read the data, find the rewards, and only then load the model.

    Raises:
        ConfigError: something is wrong with the input; what is cheap to check is checked first.
    """
    check_device(config, world.device)
    tokenizer = load_tokenizer(config)
    hf_config = load_hf_config(config.model)
    dims = ModelDims.from_config(hf_config)
    check_lora(config.model, dims)
    attention_choice(config, dims, world.device)  # refuses a kernel that cannot run, long before weights are read
    check_vocabulary(tokenizer, hf_config.vocab_size, config)
    prompts = training_prompts(config, tokenizer, dataset)
    stream = PromptStream(prompts, seed=config.seed, shuffle=config.data.shuffle)
    held_out = held_out_prompts(config, tokenizer) if config.eval.every else []
    runner = RewardRunner(config.rewards.functions, on_error=config.rewards.on_error, extra=rewards)
    for prompt in (*prompts[:1], *held_out[:1]):
        runner.check(prompt)
    seed_all(config.seed + world.rank)
    policy = place_policy(config, world)
    reference = initial_model(policy, config, world) if config.loss.kl_coef else None
    optimizer = build_optimizer(policy, config.optim)
    engine = EmbeddedEngine(
        policy,
        tokenizer,
        end_token_ids(policy, tokenizer),
        max_concurrent=config.rollout.max_concurrent,
        any_rank=world.any,
    )
    updater = Updater(config, world, policy, reference, optimizer, cost=lambda group: group_cost(dims, group, config))
    return Run(config, world, dims, stream, held_out, runner, policy, engine, updater)


def initial_model(policy: Policy, config: Config, world: World) -> LogprobsOf:
    """What the KL term compares with: the weights that LoRA leaves as they are, else a second copy of the model."""
    if config.model.lora_rank:
        return without_adapters(policy)
    return place_policy(config, world).requires_grad_(False)


def end_token_ids(policy: Policy, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and those that the model's generation config adds.

    Raises:
        ConfigError: there are none.
    """
    ids: set[int] = set()
    for eos in (tokenizer.eos_token_id, getattr(policy.model.generation_config, "eos_token_id", None)):
        ids |= {eos} if isinstance(eos, int) else set(eos or ())  # pyright: ignore[reportAssignmentType]
    if not ids:
        raise ConfigError("model.path: neither the tokenizer nor generation_config.json has an eos token: add one")
    return sorted(ids)


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        ConfigError: there is none at ``model.path``.
    """
    model = config.model
    try:
        return AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.path={model.path}: cannot load a tokenizer: {reason}") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, config: Config) -> None:
    """Refuse a tokenizer that can produce ids that the model has no embedding for."""
    if len(tokenizer) > vocab_size:
        raise ConfigError(
            f"model.path={config.model.path}: its tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}: "
            "resize the model's embeddings, or use the tokenizer that it was trained with"
        )


def training_prompts(
    config: Config, tokenizer: PreTrainedTokenizerBase, dataset: Iterable[Mapping[str, Any]] | None
) -> list[Prompt]:
    """All training prompts; at least one step's worth."""
    loaded = load_prompts(config.data, config.prompt, tokenizer, dataset=dataset)
    if loaded.dropped or loaded.truncated:
        limit = config.data.max_prompt_tokens
        log.warning("prompts over %d tokens: %d dropped, %d truncated", limit, loaded.dropped, loaded.truncated)
    if len(loaded.prompts) < config.rollout.prompts_per_step:
        raise ConfigError(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}: the data set has only {len(loaded.prompts)} "
            f"prompts: set rollout.prompts_per_step to at most that, or add rows"
        )
    return loaded.prompts


def held_out_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The first ``eval.rows`` held-out prompts."""
    return load_prompts(config.data, config.prompt, tokenizer, held_out=True).prompts[: config.eval.rows]


def group_cost(dims: ModelDims, group: Group, config: Config) -> float:
    """FLOPs of the group's forward and backward."""
    lengths, shared = [len(c.token_ids) for c in group.completions], config.model.attention == "grouped"
    adapters = adapter_parameters(config.model, dims)
    return update_flops(dims, len(group.prompt.token_ids), lengths, shared=shared, adapters=adapters)


def _load_parameters(policy: Policy, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters = _trained(policy)
    if differing := sorted(parameters.keys() ^ tensors.keys()):
        raise checkpoint.CheckpointError(
            f"the checkpoint is of another model, or of other model.lora_* keys: {differing[:3]} are not in both"
        )
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise checkpoint.CheckpointError(
                f"the checkpoint is of another model, or of another model.lora_rank: {name} is "
                f"{list(tensors[name].shape)} there, {list(parameter.shape)} here"
            )
        distributed.copy_full(parameter, tensors[name])


def _trained(policy: Policy) -> dict[str, torch.nn.Parameter]:
    """What a checkpoint holds: with LoRA the adapters only."""
    return {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
