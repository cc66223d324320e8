"""What a step of updates does to the weights, against the same done the long way on the untouched model."""

import copy
import json
import math
import shutil
from contextlib import ExitStack

import making
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgrpo import grpo
from pgrpo.admission.compare import reference_logprobs, tokens_as_groups
from pgrpo.algorithm.advantages import has_spread, step_advantages
from pgrpo.algorithm.loss import policy_loss
from pgrpo.algorithm.metrics import group_metrics
from pgrpo.config import LossConfig, load_config
from pgrpo.distributed.world import World
from pgrpo.grpo import backward, grpo_step, sample_groups, update_policy
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.rollout.base import sample_seeds
from pgrpo.training import update
from pgrpo.training.build import build as build_parts
from pgrpo.training.caller import Given
from pgrpo.training.progress import Progress
from pgrpo.training.update import count, has_gradient, micro_batches, refresh_reference
from pgrpo.types import Sample

FLAT = [1.0, 1.0, 1.0, 1.0]
SKIPPED = "Skipped the update: in every group rewards are equal or completions masked, so there is no gradient"


def ones(completions, **_):
    return [float("1" in text) for text in completions]


@pytest.fixture
def build(tiny_model, tmp_path):
    """A function: overrides -> the parts of a run that has not begun."""
    torch.set_num_threads(1)
    with ExitStack() as stack:

        def make(*overrides, rewards=(ones,)):
            keys = [f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", "rewards.functions=[]", "eval.every=0"]
            keys += ["rollout.prompts_per_step=4", "rollout.group_size=4", "optim.lr=1e-2", "optim.eps=1e-3"]
            config = load_config("quickstart", [*keys, *overrides], rewards_from_python=True)
            return stack.enter_context(build_parts(config, World(0, 1, torch.device("cpu")), Given(rewards)))

        yield make


def make_groups(number=4):
    generator = torch.Generator().manual_seed(0)

    def ids(most):
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return torch.randint(3, 14, (length,), generator=generator).tolist()

    return compare(
        tokens_as_groups([ids(7) for _ in range(number)], [[ids(5) for _ in range(4)] for _ in range(number)])
    )


def compare(groups):
    """The groups, with advantages."""
    for group, values in zip(groups, step_advantages([g.rewards for g in groups], LossConfig()), strict=True):
        set_advantages(group, values)
    return groups


def set_advantages(group, values):
    for episode, value in zip(group.episodes, values, strict=True):
        for sample in episode.samples:
            sample.advantages = [value] * len(sample.token_ids)


def with_rewards(group, rewards):
    """A copy of the group that was judged otherwise."""
    group = copy.deepcopy(group)
    for episode, reward in zip(group.episodes, rewards, strict=True):
        episode.reward = reward
    return compare([group])[0]


def without_tokens(episode):
    for sample in episode.samples:
        sample.token_ids, sample.mask, sample.rollout_logprobs, sample.advantages = [], [], [], []


def samples_of(groups):
    return [sample for group in groups for sample in group.samples]


def step(parts, groups):
    return update_policy(parts.learner, Progress(), groups)


def sample(parts):
    with parts.engine.awake(0):
        return sample_groups(parts, 0)


def untouched_logprobs(model, groups):
    return reference_logprobs(model, samples_of(groups))


def rows(flat, groups):
    """[L] -> [B, R]."""
    lengths = [len(s.token_ids) for s in samples_of(groups)]
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)


def advantage_rows(groups):
    """[B, R]."""
    return rows(torch.tensor([a for s in samples_of(groups) for a in s.advantages]), groups)


@pytest.mark.parametrize(("updates", "epochs"), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_updates_and_epochs_equal_the_long_way(build, tiny_model, updates, epochs, ratio):
    """The long way: old log-probs of all samples first, one sample a forward, one batch an update, on transformers' model."""
    parts = build(f"train.updates_per_step={updates}", f"train.epochs_per_step={epochs}", f"loss.ratio={ratio}")
    groups = make_groups()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    size = len(groups) // updates
    shares = [groups[i : i + size] for i in range(0, len(groups), size)]
    old = [untouched_logprobs(model, share).detach() for share in shares]
    clipped = 0
    for i in [*range(updates)] * epochs:
        logprobs, share = rows(untouched_logprobs(model, shares[i]), shares[i]), shares[i]
        mask = rows(torch.ones_like(old[i]), share).bool()
        advantages_BR = advantage_rows(share)
        out = policy_loss(logprobs, rows(old[i], share), advantages_BR, mask, count(share), LossConfig(ratio=ratio), 1)
        clipped += int(out.clipped_low + out.clipped_high)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert (clipped > 0) == (updates * epochs > 1)
    before = copy.deepcopy(parts.policy.model.state_dict())
    metrics = step(parts, groups)
    assert (metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] > 0) == (clipped > 0)
    moved = {name: w - before[name] for name, w in parts.policy.model.state_dict().items()}
    wanted = {name: w - before[name] for name, w in model.state_dict().items()}
    for name, change in wanted.items():
        assert (moved[name] - change).norm() <= 2e-4 * change.norm(), name
    packed = sum(len(g.prompt.token_ids) + sum(len(e.token_ids) for e in g.episodes) for g in groups)
    assert metrics["tokens/packed"] == epochs * packed


def gradients(parts, groups, counted=None):
    for batch in micro_batches(parts.learner, groups):
        backward(parts.learner, batch, count(counted or groups))
    named = {n: p.grad.clone() for n, p in parts.policy.named_parameters() if p.grad is not None}
    parts.learner.optimizer.zero_grad()
    return named


def assert_close(got, wanted):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("aggregate", ["token", "sample"])
def test_tokens_that_the_policy_did_not_sample_are_read_and_neither_in_the_loss_nor_counted(
    build, tiny_model, aggregate
):
    """Partial masks, values and gradients against the untouched model, one unpadded sample a call, written out."""
    parts, groups = build(f"loss.aggregate={aggregate}"), make_groups()
    generator = torch.Generator().manual_seed(1)
    for sample in samples_of(groups):
        sample.mask = (torch.rand(len(sample.mask), generator=generator) < 0.6).tolist()
    masks = [s.mask for s in samples_of(groups)]
    kept = sum(map(sum, masks))
    assert 0 < kept < 0.8 * sum(map(len, masks)) and any(not any(mask) for mask in masks)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    loss = torch.zeros(())
    for group in groups:
        for episode in group.episodes:
            ids, prompt, mask = episode.token_ids, group.prompt.token_ids, torch.tensor(episode.samples[0].mask)
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0][mask]
            weight = 1 / kept if aggregate == "token" else 1 / max(len(logp), 1) / len(masks)
            loss = loss - weight * (episode.samples[0].advantages[0] * (logp - logp.detach()).exp()).sum()
    loss.backward()
    assert_close(
        gradients(parts, groups), {n: p.grad for n, p in Policy(model).named_parameters() if p.grad is not None}
    )
    assert step(parts, groups)["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_counts_are_of_all_samples_and_of_the_tokens_that_the_policy_sampled():
    """An episode whose history was rewritten has two samples."""
    one = making.group([1], making.episode([4, 5, 6], mask=[True, False, True]), making.episode([7]))
    one.episodes[0].samples.append(Sample([1, 9], [8], [True], [0.0]))
    assert count([one, one]) == (2 * 4, 2 * 3)


def test_a_step_s_samples_say_which_weights_sampled_them_and_their_tokens_have_their_episode_s_advantage(build):
    parts = build("optim.schedule=constant")
    for done in (0, 3):
        groups, _ = grpo_step(parts, Progress(step=done))
        assert {sample.weights_version for sample in samples_of(groups)} == {done}
        assert any(has_spread(group.rewards) for group in groups)
        for group in groups:
            rewards = torch.tensor(group.rewards, dtype=torch.float64)
            wanted = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            for episode, advantage in zip(group.episodes, wanted.tolist(), strict=True):
                (sample,) = episode.samples
                assert sample.advantages == pytest.approx([advantage] * len(sample.token_ids))


def cut(groups, *where):
    """The groups with some episodes cut at the limit."""
    groups = copy.deepcopy(groups)
    for group, sample in where:
        groups[group].episodes[sample].finish_reason = "length"
    return groups


@pytest.mark.parametrize("aggregate", ["token", "sample", "constant"])
def test_a_masked_completion_has_no_gradient_and_stays_in_every_count(build, aggregate):
    """As if its advantage were 0."""
    parts = build("loss.mask_overlong=true", f"loss.aggregate={aggregate}")
    groups = cut(make_groups(), (0, 1), (2, 0), *((3, i) for i in range(4)))
    batches = micro_batches(parts.learner, groups)
    kept = [e for g in groups for e in g.episodes if e.finish_reason == "stop"]
    assert sum(int(b.mask.sum()) for b in batches) == sum(len(e.token_ids) for e in kept) < count(groups).tokens
    assert sum(len(b.advantages) for b in batches) == 12  # the last group has nothing left
    got = gradients(parts, groups)
    without = copy.deepcopy(groups)
    for group in without:
        kept = [episode.finish_reason == "stop" for episode in group.episodes]
        set_advantages(
            group, [e.samples[0].advantages[0] if stays else 0.0 for e, stays in zip(group.episodes, kept, strict=True)]
        )
        for episode in group.episodes:
            episode.finish_reason = "stop"
    assert_close(got, gradients(parts, without))


@pytest.mark.parametrize(
    ("overrides", "flat", "spread", "all_cut"),
    [
        ([], False, True, True),
        (["loss.kl_coef=0.1"], True, True, True),
        (["loss.entropy_coef=0.1"], True, True, True),
        (["loss.mask_overlong=true"], False, True, False),
        (["loss.mask_overlong=true", "loss.entropy_coef=0.1", "loss.kl_coef=0.1"], True, True, False),
    ],
)
def test_what_is_left_out_of_the_update(build, overrides, flat, spread, all_cut):
    parts = build(*overrides)
    group = make_groups(1)[0]
    equal = with_rewards(group, FLAT)
    assert all(advantage == 0 for s in equal.samples for advantage in s.advantages)
    truncated = cut([group], *((0, i) for i in range(4)))[0]
    assert [has_gradient(parts.learner, g) for g in (equal, group, truncated)] == [flat, spread, all_cut]
    got = gradients(parts, [equal], counted=[equal, group])
    assert any(g.abs().max() > 1e-7 for g in got.values()) == (flat and "loss.kl_coef=0.1" not in overrides[:1])


def test_a_refreshed_reference_is_the_policy(build):
    parts = build("loss.kl_coef=0.1", "loss.ref_refresh_every=1")
    groups = make_groups()
    assert isinstance(parts.learner.reference, Policy)
    assert step(parts, groups)["kl"] == 0
    assert step(parts, groups)["kl"] > 1e-4
    before = weights(parts)
    refresh_reference(parts.learner)
    assert_unmoved(parts, before)
    assert step(parts, groups)["kl"] == 0
    assert not any(p.requires_grad for p in parts.learner.reference.parameters())


def as_sampled(parts, groups):
    """The groups, with the policy's own log-probs as the sampler's."""
    with torch.no_grad():
        flat = parts.policy(build_batch(Forest.of(samples_of(groups)))).logprobs.tolist()
    for sample in samples_of(groups):
        sample.rollout_logprobs = [flat.pop(0) for _ in sample.token_ids]
    return groups


def test_what_a_rollout_correction_did_is_logged(build):
    parts = build("loss.rollout_correction=token_mask", "loss.rollout_correction_cap=1.5", "optim.lr=0")
    groups = as_sampled(parts, make_groups())
    assert step(parts, groups)["sampling/frac_masked"] == 0
    groups[0].samples[0].rollout_logprobs[0] -= 1.0
    tokens = count(groups).tokens
    metrics = step(parts, groups)
    assert metrics["sampling/frac_masked"] == pytest.approx(1 / tokens)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(1, abs=1e-4)
    assert "sampling/frac_truncated" not in metrics
    assert "corrected" not in metrics


def test_over_updates_a_maximum_is_a_maximum_and_means_are_by_tokens(build):
    """With weights that stay, two updates of unequal lengths log what one update of all groups does."""
    keys = (
        "optim.lr=0",
        "loss.kl_coef=0.1",
        "loss.rollout_correction=token_truncate",
        "loss.rollout_correction_cap=1.05",
    )
    one, two = build(*keys), build(*keys, "train.updates_per_step=2")
    groups = as_sampled(one, make_groups())
    for sample in samples_of(groups[:2]):
        for values in (sample.token_ids, sample.mask, sample.rollout_logprobs, sample.advantages):
            del values[1:]
    tokens = [count(share).tokens for share in (groups[:2], groups[2:])]
    assert tokens[0] < tokens[1] / 2
    groups[0].samples[0].rollout_logprobs[0] -= 0.1
    groups[3].samples[0].rollout_logprobs[0] -= 9.9
    wanted, got = step(one, groups), step(two, groups)
    assert got["sampling/sampling_logp_difference/max"] == pytest.approx(9.9, abs=1e-4)
    assert got["sampling/sampling_logp_difference/mean"] == pytest.approx(10.0 / sum(tokens), rel=1e-4)
    assert got["sampling/frac_truncated"] == pytest.approx(2 / sum(tokens))
    for name in ("entropy", "kl", "sampling/importance_sampling_ratio/mean", "sampling/sampling_logp_difference/max"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-9), name


def test_loss_and_gradient_norm_are_means_over_the_updates_that_were_done(build):
    """Of four updates one has no gradient and one is not finite."""
    parts, alone = build("train.updates_per_step=4", "optim.lr=0"), build("optim.lr=0")
    groups = as_sampled(parts, make_groups())
    groups[0] = with_rewards(groups[0], FLAT)
    groups[1].samples[0].advantages[0] = math.inf
    wanted = [step(alone, [group]) for group in groups[2:]]
    got = step(parts, groups)
    assert got["skipped_updates"] == 1
    for name in ("loss", "grad_norm"):
        assert got[name] == pytest.approx(sum(metrics[name] for metrics in wanted) / 2, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("correction", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_rollout_logprobs_that_are_no_numbers_are_counted_and_left_out_of_the_sampler_s_metrics(build, correction):
    parts = build(f"loss.rollout_correction={correction}", "train.updates_per_step=2", "optim.lr=0")
    groups = as_sampled(parts, make_groups())
    groups[0].samples[0].rollout_logprobs[0] = math.nan
    groups[3].samples[1].rollout_logprobs[0] = -math.inf
    metrics = step(parts, groups)
    assert metrics["sampling/nonfinite_logprobs"] == 2
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 0
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("correction", "warnings"), [("token_mask", 1), ("sequence_mask", 1), ("token_truncate", 0)])
def test_a_step_in_which_a_correction_masks_everything_says_so(build, caplog, correction, warnings):
    parts = build(f"loss.rollout_correction={correction}", "train.updates_per_step=2")
    groups = as_sampled(parts, make_groups())
    step(parts, groups)
    assert "masked every token" not in caplog.text
    for sample in samples_of(groups):
        sample.rollout_logprobs = [x - 5 for x in sample.rollout_logprobs]
    metrics = step(parts, groups)
    assert caplog.text.count(f"loss.rollout_correction={correction} masked every token of this step") == warnings
    assert (metrics["grad_norm"] == 0) == bool(warnings)


@pytest.mark.parametrize(
    "sampling",
    [("top_p=0.9",), ("top_p=0.95", "top_k=5"), ("top_k=3", "temperature=0.6"), ("temperature=1.7", "top_p=0.7"), ()],
    ids=str,
)
def test_where_the_sampler_is_the_policy_no_setting_of_the_sampling_makes_a_ratio(build, sampling):
    keys = [f"rollout.{key}" for key in sampling]
    parts = build("loss.rollout_correction=sequence_mask", "loss.rollout_correction_cap=1.01", *keys)
    groups, _, _ = sample(parts)
    metrics = step(parts, compare(groups))
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["sampling/frac_masked"] == 0 and metrics["grad_norm"] > 0


def test_groups_without_spread_are_sampled_again(build):
    first, _, metrics = sample(build())
    assert len(first) == 4
    assert "resampling/rounds" not in metrics
    flat = [i for i, g in enumerate(first) if not has_spread(g.rewards)]
    assert flat, "nothing to sample again"
    parts = build("rollout.resample_limit=30")
    groups, all_groups, metrics = sample(parts)
    assert all(has_spread(g.rewards) for g in groups)
    assert [g.episodes for i, g in enumerate(groups) if i not in flat] == [
        g.episodes for i, g in enumerate(first) if i not in flat
    ]
    assert [g.episodes for g in all_groups[:4]] == [g.episodes for g in first]
    extra = len(all_groups) - 4
    assert extra >= len(flat)
    assert sum(not has_spread(g.rewards) for g in all_groups) == extra  # each made room for one
    assert parts.stream.state_dict()["offset"] == 4 + extra
    assert len({g.prompt.index for g in all_groups}) == 4 + extra  # fresh prompts
    assert metrics["resampling/groups"] == extra
    assert metrics["resampling/rounds"] >= 1
    assert metrics["resampling/frac_reward_zero_std"] == 0


@pytest.mark.parametrize("masks", [True, False])
def test_a_group_that_mask_overlong_masks_is_sampled_again(build, monkeypatch, masks):
    """Its rewards differ, but it has no gradient."""
    first, _, _ = sample(build())
    spread = next(i for i, g in enumerate(first) if has_spread(g.rewards))
    overlong = [e.token_ids for e in first[spread].episodes]
    masked = lambda episode, loss: loss.mask_overlong and episode.token_ids in overlong  # noqa: E731
    monkeypatch.setattr(update, "_is_masked", masked)
    parts = build("rollout.resample_limit=30", f"loss.mask_overlong={str(masks).lower()}")
    groups, _, _ = sample(parts)
    assert (groups[spread].episodes == first[spread].episodes) is not masks


def test_at_the_limit_what_is_left_is_kept_and_skipped(build):
    parts = build("rollout.resample_limit=3", rewards=[lambda completions, **_: [0.5] * len(completions)])
    groups, all_groups, metrics = sample(parts)
    assert len(all_groups) == 4 * 4
    assert groups == all_groups[-4:]
    assert metrics["resampling/rounds"] == 3
    assert metrics["resampling/frac_reward_zero_std"] == 1
    for group in groups:
        set_advantages(group, [0.0] * 4)
    metrics = step(parts, groups)
    assert (metrics["grad_norm"], metrics["tokens/packed"]) == (0, 0)


def assert_unmoved(parts, before):
    for name, weight in parts.policy.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def weights(parts):
    return copy.deepcopy(parts.policy.model.state_dict())


@pytest.mark.faults
def test_a_gradient_that_overflows_beside_a_finite_loss_is_skipped(build):
    parts, groups = build(), make_groups()
    for sample in samples_of(groups):
        sample.advantages = [1e30 * advantage for advantage in sample.advantages]
    before = weights(parts)
    metrics = step(parts, groups)
    assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] == math.inf and metrics["skipped_updates"] == 1
    assert_unmoved(parts, before)


@pytest.mark.faults
@pytest.mark.parametrize("aggregate", ["token", "sample", "constant"])
def test_an_empty_completion_divides_nothing_by_zero(build, tiny_model, aggregate):
    """Gradients are those of the untouched model, where its row has no token; it counts as a sample."""
    parts = build(f"loss.aggregate={aggregate}", "rollout.max_completion_tokens=5", "train.token_budget=64")
    groups = make_groups()
    for group, sample in ((0, 1), (2, 3), (3, 0)):
        without_tokens(groups[group].episodes[sample])
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    flat = untouched_logprobs(model, groups)
    logprobs, mask = rows(flat, groups), rows(torch.ones_like(flat), groups).bool()
    assert not mask.any(1)[[1, 11, 12]].any() and mask.any(1).sum() == 13
    loss = LossConfig(aggregate=aggregate)
    policy_loss(logprobs, logprobs.detach(), advantage_rows(groups), mask, count(groups), loss, 5).loss.backward()
    assert_close(
        gradients(parts, groups), {n: p.grad for n, p in Policy(model).named_parameters() if p.grad is not None}
    )
    metrics = group_metrics(groups) | step(parts, groups)
    assert all(math.isfinite(value) for value in metrics.values()), metrics


@pytest.mark.faults
@pytest.mark.parametrize("more", [[], ["loss.kl_coef=0.1", "loss.entropy_coef=0.1"]])
def test_a_step_of_empty_completions_goes_on(build, more):
    parts, groups = build(*more), make_groups()
    for group in groups:
        for episode in group.episodes:
            without_tokens(episode)
    before = weights(parts)
    metrics = group_metrics(groups) | step(parts, groups)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["completions/mean_length"] == 0
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert_unmoved(parts, before)


@pytest.mark.faults
@pytest.mark.parametrize("more", [[], ["loss.kl_coef=0.1", "loss.entropy_coef=0.1"]])
def test_a_step_whose_completions_are_all_truncated_and_masked_goes_on(build, caplog, more):
    """Loss 0, no update, said; the next step learns as if it had not been."""
    parts, groups = build("loss.mask_overlong=true", *more), make_groups()
    before = weights(parts)
    metrics = step(parts, cut(groups, *((g, i) for g in range(4) for i in range(4))))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert caplog.text.count(SKIPPED) == 1
    assert_unmoved(parts, before)
    other = build("loss.mask_overlong=true", *more)
    assert step(parts, groups)["grad_norm"] == step(other, groups)["grad_norm"] > 0
    assert_unmoved(parts, weights(other))


@pytest.mark.faults
def test_a_step_of_equal_rewards_skips_the_update_and_logs_it(build, caplog):
    """Eight times 0.1, whose computed mean is 0.09999999999999999."""
    parts = build("rollout.group_size=8", rewards=[lambda completions, **_: [0.1] * len(completions)])
    (groups, _, _), before = sample(parts), weights(parts)
    assert sum([0.1] * 8) / 8 != 0.1
    assert [group.rewards for group in groups] == [[0.1] * 8] * 4
    assert step_advantages([group.rewards for group in groups], LossConfig()) == [[0.0] * 8] * 4
    metrics = group_metrics(groups) | step(parts, compare(groups))
    assert metrics["frac_reward_zero_std"] == 1 and metrics["grad_norm"] == metrics["tokens/packed"] == 0
    assert metrics["loss"] == 0 and not {name for name in metrics if name.startswith(("entropy", "clip", "sampling"))}
    assert caplog.text.count(SKIPPED) == 1
    assert_unmoved(parts, before)


@pytest.mark.faults
def test_a_step_without_a_reward_says_so(build, caplog):
    parts = build(rewards=[lambda completions, **_: [None] * len(completions)])
    (groups, _, _), before = sample(parts), weights(parts)
    assert step(parts, compare(groups))["grad_norm"] == 0
    assert caplog.messages == [
        "Skipped the update: no completion has a reward (a reward failed on it, or none applies to it), so there is no gradient"
    ]
    assert_unmoved(parts, before)


@pytest.mark.faults
def test_the_final_eos_is_in_the_loss_when_it_is_also_the_pad_token(build, tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id != eos
    shutil.copytree(tiny_model, tmp_path / "same")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "same")
    settings = json.loads((tmp_path / "same" / "config.json").read_text())
    (tmp_path / "same" / "config.json").write_text(json.dumps(settings | {"pad_token_id": eos}))
    assert AutoTokenizer.from_pretrained(tmp_path / "same").pad_token_id == eos
    metrics = []
    for more in ([], [f"model.path={tmp_path / 'same'}"]):
        parts = build("rollout.max_completion_tokens=16", *more)
        groups = compare(sample(parts)[0])
        ended = [e for g in groups for e in g.episodes if e.finish_reason == "stop"]
        assert len(ended) > 4 and all(e.token_ids[-1] == eos and e.samples[-1].mask[-1] for e in ended)
        batches = micro_batches(parts.learner, groups)
        trained = [e for g in groups if has_gradient(parts.learner, g) for e in g.episodes]
        in_loss = sum(int((b.unpack(b.target_ids) == eos)[b.mask].sum()) for b in batches)
        assert in_loss == sum(e.finish_reason == "stop" for e in trained) > 0
        metrics.append(step(parts, groups))
        assert metrics[-1]["grad_norm"] > 0
    # Not the gradient norm: transformers gives the pad token's row of the embedding no gradient as an input.
    for name in ("loss", "entropy", "tokens/packed", "sampling/importance_sampling_ratio/mean"):
        assert metrics[0][name] == metrics[1][name], name


def test_prompts_that_begin_alike_are_sampled_next_to_each_other(tiny_model, tmp_path, monkeypatch):
    """Groups come back in the order of the data, and each prompt has the seeds of its place in it."""
    dataset = [{"a": a, "b": b, "answer": "1"} for b, a in enumerate((33, 11, 22, 11, 33, 22))]
    keys = [f"model.path={tiny_model}", f"run_dir={tmp_path}", "eval.every=0", "rollout.prompts_per_step=6"]
    keys += ["rollout.group_size=2", "data.shuffle=false"]
    asked = []

    def sampled(episodes, rewards, world, prompts, params, seeds, *more):
        asked.append(([p.token_ids for p in prompts], seeds))
        return sample_and_score(episodes, rewards, world, prompts, params, seeds, *more)

    sample_and_score = grpo.sample_and_score
    monkeypatch.setattr(grpo, "sample_and_score", sampled)
    with build_parts(
        load_config("quickstart", keys), World(0, 1, torch.device("cpu")), Given(dataset=dataset)
    ) as parts:
        wanted = [p.token_ids for p in parts.stream.take(6)]
        with parts.engine.awake(4):
            groups, _, _ = grpo.sample_groups(parts, 4)
    ((prompts, seeds),) = asked
    assert prompts == sorted(wanted) != wanted
    assert [g.prompt.token_ids for g in groups] == wanted
    places = [wanted.index(ids) for ids in prompts]
    assert seeds == [sample_seeds(parts.config.seed, 4, place, group_size=2) for place in places]
