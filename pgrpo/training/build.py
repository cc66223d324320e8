"""Builds the parts of a run from its config: first the data and the rewards, then the model, as errors are cheap before it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from transformers.utils.logging import disable_progress_bar

from pgrpo.admission.fits import check_chunks, check_heads, check_lora, check_positions, check_sampled_positions
from pgrpo.admission.linear import check_linear
from pgrpo.admission.models import check_model
from pgrpo.admission.on_device import PROMPTS, check_on_device
from pgrpo.admission.rows import check_rows
from pgrpo.algorithm.loss import LossOutput, policy_loss
from pgrpo.config import Config, ConfigError
from pgrpo.data import PromptStream
from pgrpo.distributed.world import World
from pgrpo.environments.episodes import Episodes
from pgrpo.environments.toolbox import load_toolbox
from pgrpo.environments.transitions import Transition
from pgrpo.model.families.experts import experts_text, untrained_text
from pgrpo.model.families.linear import states_text
from pgrpo.model.policy import Policy
from pgrpo.placement.choices import attention_choice, check_device, engine_name, is_compiled
from pgrpo.placement.layers import keepable_tokens
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.hub import load_hf_config
from pgrpo.planning.kept import kept_text, longest_kept, why_none_kept
from pgrpo.process.caches import use_caches
from pgrpo.process.rng import seed_all
from pgrpo.rewards.runner import RewardRunner
from pgrpo.rollout.base import RolloutEngine
from pgrpo.rollout.ends import check_turn_end, end_token_ids, generation_eos
from pgrpo.tracking.live import counting
from pgrpo.training.caller import Given
from pgrpo.training.compile_ahead import CompileAhead
from pgrpo.training.engine import Canary, build_canary, build_engine, check_built, check_engine, check_pushable
from pgrpo.training.evaluation import check_keep_best
from pgrpo.training.offload import OffloadedAdamW
from pgrpo.training.optim import build_optimizer
from pgrpo.training.own_loss import loss_function
from pgrpo.training.place import place_policy, place_reference, place_teacher
from pgrpo.training.prompts import (
    check_enough,
    check_vocabulary,
    held_out_prompts,
    load_tokenizer,
    training_prompts,
    with_readable_golds,
)
from pgrpo.training.teacher import check_teacher
from pgrpo.training.vision import engine_images, image_reader, prepare_prompts, see
from pgrpo.types import Prompt
from pgrpo.vision.reader import ImageReader

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learner:
    """The parts that an update needs.

    Attributes:
        policy: the model that is trained.
        reference: the initial model for the KL term, with LoRA the policy itself, whose adapters are then off; None without that
            term.
        teacher: the model of ``loss.teacher``.
        optimizer: of the policy's parameters.
        dims: sizes of the model, for cost estimates.
        loss: ``policy_loss``, or the user's function that takes its place.
        most_kept: tokens of the longest prefix that may be kept for several passes.
    """

    config: Config
    world: World
    policy: Policy
    reference: Policy | None
    optimizer: torch.optim.Optimizer
    dims: ModelDims
    loss: Callable[..., LossOutput] = policy_loss
    teacher: Policy | None = None
    most_kept: int = 0


@dataclass(frozen=True)
class Parts:
    """The parts of a run. ``Progress`` holds the state that changes from step to step."""

    config: Config
    world: World
    stream: PromptStream
    held_out: list[Prompt]
    rewards: RewardRunner
    learner: Learner
    engine: RolloutEngine
    episodes: Episodes
    canary: Canary | None
    transitions: Sequence[Transition] = ()
    reader: ImageReader | None = None
    notes: Sequence[str] = ()
    """What a run's log says of its model when it starts."""

    @property
    def policy(self) -> Policy:
        return self.learner.policy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.rewards.close()
        self.episodes.close()
        if kind is None or self.world.size == 1:  # after an error other ranks may not take part
            self.engine.close()


def build(config: Config, world: World, given: Given = Given(), ahead: CompileAhead | None = None) -> Parts:
    """All parts of a run; use ``with`` to close them.

    Args:
        ahead: compiles the first update meanwhile.

    Raises:
        ConfigError: the input is wrong. Cheap checks come first.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()  # in a file it is a line of carriage returns before the first message
    use_caches(config.cache_dir)
    check_device(config, world.device)
    tokenizer = load_tokenizer(config)
    hf_config = load_hf_config(config.model)
    max_sample = config.max_sample_tokens
    check_positions(config.model, hf_config, max_sample, config.sampled_limit)
    if engine_name(config, world.device) == "vllm":
        check_sampled_positions(config, hf_config)
    check_linear(config.model.path, hf_config, world.device)
    if ahead is not None:
        ahead.begin(hf_config)
    not_kept = check_model(config.model.path, hf_config, max_sample).not_kept
    dims = ModelDims.from_config(hf_config)
    check_lora(config.model, dims)
    check_chunks(config.model, dims)
    check_heads(config.model.sequence_parallel_size, dims)
    check_rows(config.model.path, hf_config, max_sample, config.model.sequence_parallel_size)
    reader = image_reader(config, hf_config, tokenizer, world)
    check_engine(config, dims, world)
    check_pushable(config, hf_config, world)
    built = check_built(config, hf_config, world)
    attention = attention_choice(
        config, dims, world.device
    )  # refuses a kernel that cannot run, before weights are read
    vocab_size = hf_config.get_text_config().vocab_size
    check_vocabulary(tokenizer, vocab_size, config)
    if config.loss.teacher is not None:
        teachers = check_teacher(config, tokenizer, vocab_size, world.device)
        not_kept = not_kept or (teachers.not_kept and f"of the teacher, {teachers.not_kept}")
    toolbox = load_toolbox(config, given.tools, given.environment)
    toolbox.check_rewards(given.rewards)
    prompts = training_prompts(config, tokenizer, given.dataset, toolbox.schemas_of, reader)
    held_out = []
    if config.eval.every:
        held_out = held_out_prompts(config, tokenizer, given.eval_dataset, toolbox.schemas_of, reader)
    eos = generation_eos(config.model, hf_config)
    end_ids = end_token_ids(tokenizer, eos, config.rollout.stop, config.rollout.keep_special_tokens)
    environment = config.environment
    chats = toolbox.chats(
        tokenizer, end_ids, config.prompt.chat_template_kwargs, environment.history, reader, environment.max_images
    )
    extra = [*given.rewards, *toolbox.own_rewards()]
    if not (extra or config.rewards.functions or config.loss.teacher):
        raise ConfigError("rewards.functions: [] scores nothing, and no environment has `get_reward`; name a reward")
    runner = RewardRunner(config.rewards.functions, on_error=config.rewards.on_error, extra=extra)
    try:
        prompts = with_readable_golds(prompts, config, runner, world, "training")
        held_out = with_readable_golds(held_out, config, runner, world, "held-out")
    except BaseException:
        runner.close()
        raise
    check_enough(prompts, config)
    if world.device.type == "cuda":
        check_on_device(config.model.path, hf_config, [p.token_ids for p in prompts[:PROMPTS]], attention, world.device)
    stream = PromptStream(prompts, seed=config.seed, shuffle=config.data.shuffle)
    check_keep_best(config, runner)
    loss = loss_function(config.loss)
    seed_all(config.seed + world.rank)
    with counting("loading the model"):
        policy = place_policy(config, world)
        reference = initial_model(policy, config, world) if config.loss.kl_coef else None
        teacher = place_teacher(config, world) if config.loss.teacher is not None else None
    see(policy, reader)
    if reference is not None and reference is not policy:
        see(reference, reader)
    if teacher is not None:
        teacher.head.banned = policy.head.banned  # a distribution of the same ids
        see(teacher, reader, teaches=True)
    wanted, most_kept = longest_kept(config, dims), keepable_tokens(config, dims, world)
    if not_kept:  # of the policy or of the teacher, which keeps the same rows
        wanted = most_kept = 0
    learner = Learner(
        config, world, policy, reference, build_optimizer(policy, config.optim), dims, loss, teacher,
        most_kept,
    )  # fmt: skip
    notes = (
        states_text(policy.model, world.device, compiled=is_compiled(config, world.device)),
        experts_text(policy.model),
        untrained_text(hf_config),
        built,
        f"kept prefixes: {kept_text(wanted, most_kept)}" if most_kept < wanted else "",
        f"kept prefixes: {none}" if (none := why_none_kept(config, dims, not_kept)) else "",
    )
    if world.is_main:
        check_turn_end(tokenizer, config.prompt, end_ids)
    if ahead is not None:
        with counting("compiling"):
            ahead.wait()
    with counting("starting the sampler"):
        images = engine_images(hf_config, reader, [*prompts, *held_out], environment.max_images)
        engine = build_engine(config, world, policy, learner.optimizer, tokenizer, end_ids, images)
    if ahead is not None:  # this run trains
        ahead.sampler_started()
        if isinstance(learner.optimizer, OffloadedAdamW):
            learner.optimizer.reserve()  # during the first rollout: before, vLLM captures graphs
    if engine_name(config, world.device) == "vllm":
        # Each rank prepares images of all prompts, as the rollout decides who trains on which. The embedded engine has its own.
        stream.taken = partial(prepare_prompts, (policy, reference, teacher))
    canary = build_canary(config, world, policy, engine)
    episodes = toolbox.episodes(config, engine, chats, world)
    return Parts(
        config, world, stream, held_out, runner, learner, engine, episodes, canary, toolbox.transitions, reader,
        [*filter(None, notes)],
    )  # fmt: skip


def initial_model(policy: Policy, config: Config, world: World) -> Policy:
    """The reference for the KL term: with LoRA the policy, otherwise a second copy of the model."""
    return policy if config.model.lora_rank else place_reference(config, world)
