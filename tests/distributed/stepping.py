"""Run by every rank: a step's sampling with an engine and a judge that are written here, and forwards without a gradient."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.distributed.tensor import DTensor

from pgrpo.config import Config, DataConfig, ModelConfig, RolloutConfig, load_config
from pgrpo.distributed.fsdp import reshard
from pgrpo.model.weights import full_weights
from pgrpo.rewards.runner import RewardReport
from pgrpo.rollout.base import sample_seeds, sampling_params
from pgrpo.training.engine import Canary
from pgrpo.training.evaluation import evaluate_run
from pgrpo.training.run import build_run
from pgrpo.training.sample import sample_step
from pgrpo.training.update import count
from pgrpo.types import Completion, Group, Prompt


class Echo:
    """An engine whose completions say the seed that they were drawn with."""

    def __init__(self):
        self.timings = {}

    def awake(self):
        return nullcontext()

    def generate(self, prompts, _, seeds):
        def completions(own):
            return [Completion([1], [0.0], [True], "stop", str(seed)) for seed in own]

        return [Group(p, completions(own)) for p, own in zip(prompts, seeds, strict=True)]


class Judge:
    """Rewards that are equal in the groups of prompts 1 and 4, and fail on one completion of prompt 4."""

    def __init__(self):
        self.seen = []

    def score(self, groups):
        for group in groups:
            self.seen += [c.text for c in group.completions]
            flat = group.prompt.index in (1, 4)
            group.rewards = [1.0 if flat else float(i) for i in range(len(group.completions))]
            group.reward_parts = {"judge": list(group.rewards)}
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
    run = SimpleNamespace(
        config=config, world=replace(world, sequence_parallel_size=together), engine=Echo(), rewards=judge, canary=None,
        progress=SimpleNamespace(step=5), stream=SimpleNamespace(take=lambda n: [next(rest) for _ in range(n)]),
    )  # fmt: skip
    step = sample_step(run)  # pyright: ignore[reportArgumentType]
    told = [[(g.prompt, [c.text for c in g.completions]) for g in groups] for groups in (step.groups, step.all_groups)]
    return judge.seen, *told, step.metrics


def gathered(module):
    return [name for name, p in module.named_parameters() if not isinstance(p, DTensor)]


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
    with build_run(config, world, rewards=[ones]) as run:

        def look(after):
            found[after] = gathered(run.policy) + gathered(run.updater.reference)

        look("nothing")
        prompts = run.stream.take(4)
        seeds = [sample_seeds(0, i, group_size=4) for i in range(4)]
        groups = run.engine.generate(prompts, sampling_params(config), seeds)
        look("a rollout")
        evaluate_run(run)
        look("an evaluation")
        for group in groups:
            group.rewards, group.advantages = [0.0, 1.0] * 2, [-1.0, 1.0] * 2
        canary = Canary(world, run.policy, run.engine, every=1, most_tokens=8)  # pyright: ignore[reportArgumentType]
        canary.before_update(0, groups)
        look("the canary")
        batches = run.updater.micro_batches(groups)
        run.updater._record_old_logprobs(batches)
        look("old log-probs")
        recorded = batches[0].old_logprobs
        with torch.no_grad():
            bare = batches[0].unpack(run.policy(batches[0]).logprobs)
        look("a bare forward")
        reshard(run.policy)
        run.updater.backward(batches[0], count(groups))
        look("a forward of the reference, and an update's backward")
        run.updater.optimizer.zero_grad()
        for _ in full_weights(run.policy.model, torch.bfloat16):
            pass
        look("a push")
    return found, recorded is not None and torch.equal(recorded, bare)
