"""Run by every rank: a step's sampling with an engine and a judge that are written here, and forwards without a gradient."""

from contextlib import nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from making import generate
from torch.distributed.tensor import DTensor

from pgrpo.config import Config, DataConfig, ModelConfig, RolloutConfig, load_config
from pgrpo.config.sampling import sampling_params
from pgrpo.distributed.fsdp import place, reshard
from pgrpo.environments.episodes import SingleTurn
from pgrpo.grpo import backward, sample_groups
from pgrpo.model.weights import full_weights
from pgrpo.planning.dims import decoder_layers
from pgrpo.planning.recompute import LayerPlan
from pgrpo.rewards.runner import RewardReport
from pgrpo.rollout.base import sample_seeds
from pgrpo.training import place as training_place
from pgrpo.training.build import build
from pgrpo.training.caller import Given
from pgrpo.training.engine import Canary
from pgrpo.training.evaluation import evaluate_held_out
from pgrpo.training.messages import StepClock
from pgrpo.training.update import count, micro_batches, record_old_logprobs
from pgrpo.types import Completion, Prompt


class Echo:
    """An engine whose completions say the seed that they were drawn with."""

    def __init__(self):
        self.metrics = {}

    def awake(self, version):
        return nullcontext()

    def sample(self, requests, params, on_finished, more=None):
        for position, request in enumerate(requests):
            on_finished(position, [Completion([1], [0.0], "stop", str(seed)) for seed in request.seeds])


class Judge:
    """Rewards that are equal in the groups of prompts 1 and 4, and fail on one completion of prompt 4."""

    weights: ClassVar = {"judge": 1.0}

    def __init__(self):
        self.seen = []

    def begin(self):
        added = []

        def finish(groups):
            assert added == list(enumerate(groups))  # and no fillers
            return self.score(groups)

        return SimpleNamespace(add=lambda *item: added.append(item), finish=finish)

    def score(self, groups):
        for group in groups:
            flat = group.prompt.index in (1, 4)
            for i, episode in enumerate(group.episodes):
                self.seen.append(episode.text)
                episode.reward = 1.0 if flat else float(i)
                episode.reward_parts = {"judge": episode.reward}
        return RewardReport(errors=sum(g.prompt.index == 4 for g in groups))


def sampled_step(world, together):
    """What the judge of this rank saw; (prompt, texts) of the groups and of all groups; metrics. A step of 4 prompts, one of which
    is sampled again in each of two rounds."""
    config = Config(
        model=ModelConfig(path="nowhere"), data=DataConfig(), rollout=RolloutConfig(max_completion_tokens=4)
    )
    config.seed, config.rollout.prompts_per_step, config.rollout.group_size, config.rollout.resample_limit = 0, 4, 2, 3
    rest = iter([Prompt(i, f"prompt {i}", [1], {"answer": i}) for i in range(9)])
    judge = Judge()
    parts = SimpleNamespace(
        config=config, world=replace(world, sequence_parallel_size=together), episodes=SingleTurn(Echo()),  # pyright: ignore[reportArgumentType]
        rewards=judge, stream=SimpleNamespace(take=lambda n: [next(rest) for _ in range(n)]),
    )  # fmt: skip
    groups, all_groups, metrics = sample_groups(parts, 5)  # pyright: ignore[reportArgumentType]
    told = [[(g.prompt, [e.text for e in g.episodes]) for g in some] for some in (groups, all_groups)]
    return judge.seen, *told, metrics


def peaks(world):
    """The peak memory of a step that this rank logs, and its own."""
    parts: Any = SimpleNamespace(
        world=world, policy=SimpleNamespace(vision=None), engine=SimpleNamespace(counted_bytes=0)
    )
    clock, own = StepClock(parts), 1.0 + world.rank
    clock._peak_memory = lambda: own
    updated = {"perf/flops": 1.0, "tokens/packed": 1.0, "time/old_logprobs": 0.0}
    return clock.metrics(updated)["perf/peak_memory_gib"], own


def gathered(module):
    return [name for name, p in module.named_parameters() if not isinstance(p, DTensor)]


def gathered_after_a_failed_forward(world, stay_gathered):
    """Parameters that ``reshard`` leaves gathered where a layer's forward raised."""
    layers = [torch.nn.Linear(4, 4) for _ in range(5)]
    model = torch.nn.Sequential(*layers)
    place(model, layers[1:4], world, torch.bfloat16, stay_gathered=stay_gathered)
    model(torch.ones(2, 4)).sum().backward()
    layers[2].register_forward_hook(lambda *_: 1 / 0, prepend=True)
    with suppress(ZeroDivisionError):
        model(torch.ones(2, 4))
    failed = gathered(model)
    reshard(model)
    return failed, gathered(model)


def staying_of_unlike_gpus(world, model):
    """Which layers stay gathered where the ranks' own plans differ."""
    config = load_config("quickstart", [f"model.path={model}"])
    with patch.object(training_place, "layer_plan", lambda *_: LayerPlan(["none"] * 2, 1, 2 - world.rank)):
        policy = training_place.place_policy(config, world)
    return [layer.stays_gathered for layer in decoder_layers(policy.model)]


def ones(completions, **_):
    return [float("1" in text) for text in completions]


def forwards_without_a_gradient(world, model, run_dir):
    """Parameters that are no shards after each, by name; and whether log-probs are those of a bare forward, bit for bit."""
    keys = [
        f"model.path={model}",
        f"run_dir={run_dir}",
        "model.dtype=bfloat16",
        "rewards.functions=[]",
        "loss.kl_coef=0.1",
    ]
    keys += ["rollout.prompts_per_step=4", "rollout.group_size=4", "eval.every=1", "eval.rows=3"]
    config, found = load_config("quickstart", keys, rewards_from_python=True), {}
    with build(config, world, Given([ones])) as parts:
        learner, policy, engine = parts.learner, parts.policy, parts.engine

        def look(after):
            found[after] = gathered(policy) + gathered(learner.reference)

        look("nothing")
        prompts = parts.stream.take(4)
        seeds = [sample_seeds(0, i, group_size=4) for i in range(4)]
        groups = generate(engine, prompts, sampling_params(config), seeds)
        look("a rollout")
        evaluate_held_out(config, world, SingleTurn(engine), parts.rewards, parts.held_out, 0)
        look("an evaluation")
        for group in groups:
            for i, episode in enumerate(group.episodes):
                episode.reward = float(i % 2)
                for sample in episode.samples:
                    sample.advantages = [2.0 * episode.reward - 1.0] * len(sample.token_ids)
        canary = Canary(world, policy, engine, every=1, most_tokens=8, compare_experts=False)  # pyright: ignore[reportArgumentType]
        canary.before_update(0, groups)
        look("the canary")
        batches = micro_batches(learner, groups)
        record_old_logprobs(learner, batches)
        look("old log-probs")
        recorded = batches[0].old_logprobs
        with torch.no_grad():
            bare = batches[0].unpack(policy(batches[0]).logprobs)
        look("a bare forward")
        reshard(policy)
        backward(learner, batches[0], count(groups))
        look("a forward of the reference, and an update's backward")
        learner.optimizer.zero_grad()
        for _ in full_weights(policy.model, torch.bfloat16):
            pass
        look("a push")
    return found, recorded is not None and torch.equal(recorded, bare)
