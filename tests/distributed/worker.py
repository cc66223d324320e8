"""Run by every rank: gradients of one update, before the optimizer step. As a script (on GPUs, under torchrun) it writes a file;
arguments: model, output, JSON of changes."""

import json
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.distributed as dist
from tensors import copy_full, full_tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from pgrpo.admission.compare import tokens_as_groups
from pgrpo.config import Config, DataConfig, ModelConfig, RolloutConfig
from pgrpo.distributed.fsdp import expect_micro_batches
from pgrpo.distributed.world import start
from pgrpo.grpo import backward, update_policy
from pgrpo.model.weights import full_weights
from pgrpo.packing import balance
from pgrpo.placement.layers import layer_plan
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.hub import load_hf_config
from pgrpo.process.exit import run_and_leave
from pgrpo.training.build import Learner, initial_model
from pgrpo.training.frozen import kept_prefixes, record_frozen_logprobs
from pgrpo.training.offload import local
from pgrpo.training.optim import build_optimizer
from pgrpo.training.place import place_policy, place_teacher
from pgrpo.training.progress import Progress
from pgrpo.training.sums import UpdateSums
from pgrpo.training.update import count, micro_batches, spans

KEEP_NS = balance.KEEP_NS


def long_tailed_groups(beginning=0):
    """``beginning``: tokens that all prompts begin with."""
    generator = torch.Generator().manual_seed(0)

    def ids(longest):
        n = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(3, 61, (n,), generator=generator).tolist()

    common = torch.randint(3, 61, (beginning,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [common + ids(12) for _ in range(7)]
    completions = [[ids(14) if i % 3 else ids(3) for i in range(5)] for _ in prompts]
    completions[2][1] = []
    groups = tokens_as_groups(prompts, completions)
    groups[3].episodes[2].finish_reason = "length"
    for sample in (sample for group in groups for sample in group.samples):
        sample.rollout_logprobs = [-4.1] * len(sample.token_ids)  # as a model that knows nothing would say
    for sample in groups[0].samples[:2]:
        sample.mask = [i % 2 == 0 for i in range(len(sample.token_ids))]
    for episode in groups[4].episodes:  # no spread: skipped, and counted
        episode.reward = 1.0
        for sample in episode.samples:
            sample.advantages = [0.0] * len(sample.token_ids)
    return groups


@torch.no_grad()
def go_off_policy(policy, batches):
    """Old and rollout log-probs that are not the current ones; how far away they are depends on the token alone."""
    for batch in batches:
        logprobs, shift = policy(batch).logprobs, 0.3 * torch.sin(batch.target_ids.float())
        batch.old_logprobs = batch.unpack(logprobs + shift)
        batch.rollout_logprobs = batch.unpack(logprobs + shift - 5 * shift.square())


def configure(model, changes):
    config = Config(
        model=ModelConfig(
            path=str(model),
            dtype=changes.get("dtype", "float32"),
            activation_checkpointing=changes.get("activation_checkpointing", "none"),
            compile=changes.get("compile"),
            mlp_chunks=changes.get("mlp_chunks"),
            fsdp_size=changes.get("fsdp_size"),
            sequence_parallel_size=changes.get("sequence_parallel_size", 1),
        ),
        data=DataConfig(max_prompt_tokens=12),
        rollout=RolloutConfig(max_completion_tokens=14),
    )
    for key in vars(config.loss).keys() & changes.keys():
        setattr(config.loss, key, changes[key])
    config.train.token_budget = changes.get("token_budget", 10000)
    config.train.updates_per_step = changes.get("updates_per_step", 1)
    config.train.epochs_per_step = changes.get("epochs_per_step", 1)
    config.optim.lr = changes.get("lr", 1e-6)
    config.model.attention = changes.get("attention", "grouped")
    config.model.lora_rank = changes.get("lora_rank", 0)
    config.model.lora_targets = changes.get("lora_targets", [])
    return config


def together(world, size):
    """This process among ranks of which ``size`` neighbours compute each batch together."""
    group = dist.new_subgroups(size)[0] if size > 1 else None
    return replace(world, sequence_parallel_size=size, sequence_group=group)


@contextmanager
def reduced_parameters():
    """How many parameters each reduction of FSDP2 inside this block has."""
    found, reduce = [], _fsdp_param_group.foreach_reduce  # pyright: ignore[reportPrivateImportUsage]
    with patch.object(
        _fsdp_param_group, "foreach_reduce", lambda *given: found.append(len(given[0])) or reduce(*given)
    ):
        yield found


@contextmanager
def gathers(policy):
    """How often FSDP2 gathers each part of the policy inside this block, by name."""
    group = _fsdp_param_group.FSDPParamGroup  # pyright: ignore[reportPrivateImportUsage]
    names, found, gather = {module: name for name, module in policy.named_modules()}, Counter(), group._to_unsharded

    def counted(part):
        found.update({names[part.modules[0]]: 1} if part.modules[0] in names else {})
        gather(part)

    with patch.object(group, "_to_unsharded", counted):
        yield found


def one_update(world, model, changes):
    """Sums and gradients of one update, and the metrics of another with its step. Groups are on rank 0 alone."""
    config = configure(model, changes)
    world = together(replace(world, fsdp_size=config.model.fsdp_size), config.model.sequence_parallel_size)
    plan = layer_plan(config, ModelDims.from_config(load_hf_config(config.model)), world)
    plan = plan._replace(stay_gathered=changes.get("stay_gathered", plan.stay_gathered))
    policy = place_policy(config, world, plan=plan)
    reference = None
    if config.model.lora_rank:  # new adapters change nothing; these do
        generator = torch.Generator().manual_seed(1)
        for p in policy.parameters():
            if p.requires_grad:
                copy_full(p, full_tensor(p) + 0.05 * torch.randn(p.shape, generator=generator))
    if config.loss.kl_coef:
        reference = initial_model(policy, config, world)
    if reference is not None and reference is not policy:
        with torch.no_grad():
            for p in reference.parameters():
                p.mul_(1.02)
    groups = long_tailed_groups(changes.get("beginning", 0))
    groups = groups[: len(groups) - len(groups) % config.train.updates_per_step]
    if changes.get("reverse"):
        groups = groups[::-1]
    counts = count(groups)
    if not world.is_main:
        groups = []
    optimizer = build_optimizer(policy, config.optim)
    dims = ModelDims.from_config(policy.model.config)
    teacher = place_teacher(config, world) if config.loss.teacher else None
    most_kept = changes.get("most_kept", 0)
    balance.KEEP_NS = 0.0 if most_kept else KEEP_NS
    learner = Learner(config, world, policy, reference, optimizer, dims, teacher=teacher, most_kept=most_kept)
    batches = micro_batches(learner, groups)
    if changes.get("off_policy"):
        go_off_policy(policy, batches)
    total = UpdateSums.zero(world.device)
    each = spans(batches)
    with reduced_parameters() as reductions:
        for span in each:
            record_frozen_logprobs(learner, span)
            expect_micro_batches(policy, world, more=span is not each[-1] and not changes.get("reduce_each"))
            with kept_prefixes(learner, span):
                for batch in span:
                    total = total.plus(backward(learner, batch, counts))
    sums = {name: value.item() for name, value in total.over_ranks(world)._asdict().items()}
    gradients = {name: full_tensor(p.grad).clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    optimizer.zero_grad()
    pushed = dict(full_weights(policy.model, torch.float32)) if changes.get("pushed") else {}
    before = {name: full_tensor(p).clone() for name, p in policy.model.named_parameters()}
    with reduced_parameters() as reductions_of_step, gathers(policy) as gathers_of_step:
        metrics = update_policy(learner, Progress(), groups)
    gathered = [name for name, p in policy.named_parameters() if not isinstance(p, DTensor)]
    after = {name: full_tensor(p).clone() for name, p in policy.model.named_parameters()}
    return {
        "sums": sums,
        "gradients": gradients,
        "micro_batches": len(batches),
        "reductions": sum(reductions),
        "reductions_of_step": sum(reductions_of_step),
        "gathers_of_step": dict(gathers_of_step),
        "gathered": gathered,
        "after": after,
        "kept": sum(batch.kept is not None for batch in batches),
        "metrics": metrics,
        "moved": [name for name in before if not torch.equal(before[name], after[name])],
        "names": list(before),
        "held": sum(local(p).numel() for p in policy.parameters()),
        "pushed": pushed,
        "held_of_teacher": sum(local(p).numel() for p in teacher.parameters()) if teacher else 0,
    }


def saved_by_main(world, model, changes, output):
    found = one_update(world, model, changes)
    if world.is_main:
        torch.save(found, output)


def main():
    model, output, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    with start() as world:
        saved_by_main(world, model, changes, output)


if __name__ == "__main__":
    run_and_leave(main)
