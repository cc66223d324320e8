"""What a step of updates does to the weights, against the same done the long way on the untouched model."""

import copy
import json
import math
import shutil
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgrpo.algorithm.advantages import has_spread, step_advantages
from pgrpo.algorithm.loss import policy_loss
from pgrpo.algorithm.metrics import group_metrics
from pgrpo.config import LossConfig, load_config
from pgrpo.distributed.world import World
from pgrpo.model.policy import Policy
from pgrpo.model.proof import reference_logprobs, tokens_as_groups
from pgrpo.packing.batch import build_batch
from pgrpo.training.run import build_run
from pgrpo.training.sample import sample_step
from pgrpo.training.update import count

FLAT = [1.0, 1.0, 1.0, 1.0]


def ones(completions, **_):
    return [float("1" in text) for text in completions]


@pytest.fixture
def build(tiny_model, tmp_path):
    """A function: overrides -> a run that has not begun."""
    torch.set_num_threads(1)
    with ExitStack() as runs:

        def make(*overrides, rewards=(ones,)):
            keys = [f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", "rewards.functions=[]", "eval.every=0"]
            keys += ["rollout.prompts_per_step=4", "rollout.group_size=4", "optim.lr=1e-2", "optim.eps=1e-3"]
            config = load_config("quickstart", [*keys, *overrides], rewards_from_python=True)
            return runs.enter_context(build_run(config, World(0, 1, torch.device("cpu")), rewards=list(rewards)))

        yield make


def make_groups(number=4):
    generator = torch.Generator().manual_seed(0)

    def ids(most):
        length = int(torch.randint(1, most + 1, (1,), generator=generator))
        return torch.randint(3, 14, (length,), generator=generator).tolist()

    groups = tokens_as_groups([ids(7) for _ in range(number)], [[ids(5) for _ in range(4)] for _ in range(number)])
    for group, values in zip(groups, step_advantages([g.rewards for g in groups]), strict=True):
        group.advantages = values
    return groups


def rows(flat, groups):
    """[L] -> [B, R]."""
    lengths = [len(c.token_ids) for g in groups for c in g.completions]
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)


@pytest.mark.parametrize(("updates", "epochs"), [(1, 1), (2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_updates_and_epochs_equal_the_long_way(build, tiny_model, updates, epochs, ratio):
    """The long way: old log-probs of all samples first, one sample a forward, one batch an update, on transformers' model."""
    run = build(f"train.updates_per_step={updates}", f"train.epochs_per_step={epochs}", f"loss.ratio={ratio}")
    groups = make_groups()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    size = len(groups) // updates
    shares = [groups[i : i + size] for i in range(0, len(groups), size)]
    old = [reference_logprobs(model, share).detach() for share in shares]
    clipped = 0
    for i in [*range(updates)] * epochs:
        logprobs, share = rows(reference_logprobs(model, shares[i]), shares[i]), shares[i]
        mask = rows(torch.ones_like(old[i]), share).bool()
        advantages = torch.tensor([a for g in share for a in g.advantages])
        out = policy_loss(logprobs, rows(old[i], share), advantages, mask, count(share), LossConfig(ratio=ratio), 1)
        clipped += int(out.clipped_low + out.clipped_high)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert (clipped > 0) == (updates * epochs > 1)
    before = copy.deepcopy(run.policy.model.state_dict())
    metrics = run.updater.step(groups)
    assert (metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] > 0) == (clipped > 0)
    moved = {name: w - before[name] for name, w in run.policy.model.state_dict().items()}
    wanted = {name: w - before[name] for name, w in model.state_dict().items()}
    for name, change in wanted.items():
        assert (moved[name] - change).norm() <= 2e-4 * change.norm(), name
    packed = sum(len(g.prompt.token_ids) + sum(len(c.token_ids) for c in g.completions) for g in groups)
    assert metrics["tokens/packed"] == epochs * packed


def gradients(run, groups, counted=None):
    for batch in run.updater.micro_batches(groups):
        run.updater.backward(batch, count(counted or groups))
    named = {n: p.grad.clone() for n, p in run.policy.named_parameters() if p.grad is not None}
    run.updater.optimizer.zero_grad()
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
    run, groups = build(f"loss.aggregate={aggregate}"), make_groups()
    generator = torch.Generator().manual_seed(1)
    for completion in (c for g in groups for c in g.completions):
        completion.mask = (torch.rand(len(completion.mask), generator=generator) < 0.6).tolist()
    masks = [c.mask for g in groups for c in g.completions]
    kept = sum(map(sum, masks))
    assert 0 < kept < 0.8 * sum(map(len, masks)) and any(not any(mask) for mask in masks)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    loss = torch.zeros(())
    for group in groups:
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            ids, prompt = completion.token_ids, group.prompt.token_ids
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            logp = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0][torch.tensor(completion.mask)]
            weight = 1 / kept if aggregate == "token" else 1 / max(len(logp), 1) / len(masks)
            loss = loss - weight * (advantage * (logp - logp.detach()).exp()).sum()
    loss.backward()
    assert_close(gradients(run, groups), {n: p.grad for n, p in Policy(model).named_parameters() if p.grad is not None})
    assert run.updater.step(groups)["loss"] == pytest.approx(loss.item(), abs=1e-6)


def cut(groups, *where):
    """The groups with some completions cut at the limit."""
    groups = copy.deepcopy(groups)
    for group, sample in where:
        groups[group].completions[sample].finish_reason = "length"
    return groups


@pytest.mark.parametrize("aggregate", ["token", "sample", "constant"])
def test_a_masked_completion_has_no_gradient_and_stays_in_every_count(build, aggregate):
    """As if its advantage were 0."""
    run = build("loss.mask_overlong=true", f"loss.aggregate={aggregate}")
    groups = cut(make_groups(), (0, 1), (2, 0), *((3, i) for i in range(4)))
    batches = run.updater.micro_batches(groups)
    kept = [c for g in groups for c in g.completions if c.finish_reason == "stop"]
    assert sum(int(b.mask.sum()) for b in batches) == sum(len(c.token_ids) for c in kept) < count(groups).tokens
    assert sum(len(b.advantages) for b in batches) == 12  # the last group has nothing left
    got = gradients(run, groups)
    without = copy.deepcopy(groups)
    for group in without:
        for i, completion in enumerate(group.completions):
            if completion.finish_reason == "length":
                group.advantages[i], completion.finish_reason = 0.0, "stop"
    assert_close(got, gradients(run, without))


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
    run = build(*overrides)
    group = make_groups(1)[0]
    equal = replace(group, rewards=list(FLAT), advantages=[0.0] * 4)
    truncated = cut([group], *((0, i) for i in range(4)))[0]
    assert [run.updater.trains_on(g) for g in (equal, group, truncated)] == [flat, spread, all_cut]
    got = gradients(run, [equal], counted=[equal, group])
    assert any(g.abs().max() > 1e-7 for g in got.values()) == (flat and "loss.kl_coef=0.1" not in overrides[:1])


def test_a_refreshed_reference_is_the_policy(build):
    run = build("loss.kl_coef=0.1", "loss.ref_refresh_every=1")
    groups = make_groups()
    assert isinstance(run.updater.reference, Policy)
    assert run.updater.step(groups)["kl"] == 0
    assert run.updater.step(groups)["kl"] > 1e-4
    run.updater.refresh_reference()
    assert run.updater.step(groups)["kl"] == 0
    assert not any(p.requires_grad for p in run.updater.reference.parameters())


def as_sampled(run, groups):
    """The groups, with the policy's own log-probs as the sampler's."""
    with torch.no_grad():
        flat = run.policy(build_batch(groups)).logprobs.tolist()
    for completion in (c for g in groups for c in g.completions):
        completion.rollout_logprobs = [flat.pop(0) for _ in completion.token_ids]
    return groups


def test_what_a_rollout_correction_did_is_logged(build):
    run = build("loss.rollout_correction=token_mask", "loss.rollout_correction_cap=1.5", "optim.lr=0")
    groups = as_sampled(run, make_groups())
    assert run.updater.step(groups)["sampling/frac_masked"] == 0
    groups[0].completions[0].rollout_logprobs[0] -= 1.0
    tokens = count(groups).tokens
    metrics = run.updater.step(groups)
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
    for completion in (c for g in groups[:2] for c in g.completions):
        for values in (completion.token_ids, completion.mask, completion.rollout_logprobs):
            del values[1:]
    tokens = [count(share).tokens for share in (groups[:2], groups[2:])]
    assert tokens[0] < tokens[1] / 2
    groups[0].completions[0].rollout_logprobs[0] -= 0.1
    groups[3].completions[0].rollout_logprobs[0] -= 9.9
    wanted, got = one.updater.step(groups), two.updater.step(groups)
    assert got["sampling/sampling_logp_difference/max"] == pytest.approx(9.9, abs=1e-4)
    assert got["sampling/sampling_logp_difference/mean"] == pytest.approx(10.0 / sum(tokens), rel=1e-4)
    assert got["sampling/frac_truncated"] == pytest.approx(2 / sum(tokens))
    for name in ("entropy", "kl", "sampling/importance_sampling_ratio/mean", "sampling/sampling_logp_difference/max"):
        assert got[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("correction", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_rollout_logprobs_that_are_no_numbers_are_counted_and_left_out_of_the_sampler_s_metrics(build, correction):
    run = build(f"loss.rollout_correction={correction}", "train.updates_per_step=2", "optim.lr=0")
    groups = as_sampled(run, make_groups())
    groups[0].completions[0].rollout_logprobs[0] = math.nan
    groups[3].completions[1].rollout_logprobs[0] = -math.inf
    metrics = run.updater.step(groups)
    assert metrics["sampling/nonfinite_logprobs"] == 2
    assert metrics["skipped_updates"] == 0 and metrics["grad_norm"] > 0
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("correction", "warnings"), [("token_mask", 1), ("sequence_mask", 1), ("token_truncate", 0)])
def test_a_step_in_which_a_correction_masks_everything_says_so(build, caplog, correction, warnings):
    run = build(f"loss.rollout_correction={correction}", "train.updates_per_step=2")
    groups = as_sampled(run, make_groups())
    run.updater.step(groups)
    assert "masked every token" not in caplog.text
    for completion in (c for g in groups for c in g.completions):
        completion.rollout_logprobs = [x - 5 for x in completion.rollout_logprobs]
    metrics = run.updater.step(groups)
    assert caplog.text.count(f"loss.rollout_correction={correction} masked every token of this step") == warnings
    assert (metrics["grad_norm"] == 0) == bool(warnings)


@pytest.mark.parametrize(
    "sampling",
    [("top_p=0.9",), ("top_p=0.95", "top_k=5"), ("top_k=3", "temperature=0.6"), ("temperature=1.7", "top_p=0.7"), ()],
    ids=str,
)
def test_where_the_sampler_is_the_policy_no_setting_of_the_sampling_makes_a_ratio(build, sampling):
    keys = [f"rollout.{key}" for key in sampling]
    run = build("loss.rollout_correction=sequence_mask", "loss.rollout_correction_cap=1.01", *keys)
    groups = sample_step(run).groups
    for group, values in zip(groups, step_advantages([g.rewards for g in groups]), strict=True):
        group.advantages = values
    metrics = run.updater.step(groups)
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["sampling/frac_masked"] == 0 and metrics["grad_norm"] > 0


def test_groups_without_spread_are_sampled_again(build):
    first = sample_step(build())
    assert len(first.groups) == 4
    assert "resampling/rounds" not in first.metrics
    flat = [i for i, g in enumerate(first.groups) if not has_spread(g.rewards)]
    assert flat, "nothing to sample again"
    run = build("rollout.resample_limit=30")
    again = sample_step(run)
    assert all(has_spread(g.rewards) for g in again.groups)
    assert [g.completions for i, g in enumerate(again.groups) if i not in flat] == [
        g.completions for i, g in enumerate(first.groups) if i not in flat
    ]
    assert [g.completions for g in again.all_groups[:4]] == [g.completions for g in first.groups]
    extra = len(again.all_groups) - 4
    assert extra >= len(flat)
    assert sum(not has_spread(g.rewards) for g in again.all_groups) == extra  # each made room for one
    assert run.stream.state_dict()["offset"] == 4 + extra
    assert len({g.prompt.index for g in again.all_groups}) == 4 + extra  # fresh prompts
    assert again.metrics["resampling/groups"] == extra
    assert again.metrics["resampling/rounds"] >= 1
    assert again.metrics["resampling/frac_reward_zero_std"] == 0


def test_at_the_limit_what_is_left_is_kept_and_skipped(build):
    run = build("rollout.resample_limit=3", rewards=[lambda completions, **_: [0.5] * len(completions)])
    sampled = sample_step(run)
    assert len(sampled.all_groups) == 4 * 4
    assert sampled.groups == sampled.all_groups[-4:]
    assert sampled.metrics["resampling/rounds"] == 3
    assert sampled.metrics["resampling/frac_reward_zero_std"] == 1
    for group in sampled.groups:
        group.advantages = [0.0] * 4
    metrics = run.updater.step(sampled.groups)
    assert (metrics["grad_norm"], metrics["tokens/packed"]) == (0, 0)


def assert_unmoved(run, before):
    for name, weight in run.policy.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def weights(run):
    return copy.deepcopy(run.policy.model.state_dict())


@pytest.mark.faults
@pytest.mark.parametrize("aggregate", ["token", "sample", "constant"])
def test_an_empty_completion_divides_nothing_by_zero(build, tiny_model, aggregate):
    """Gradients are those of the untouched model, where its row has no token; it counts as a sample."""
    run = build(f"loss.aggregate={aggregate}", "rollout.max_completion_tokens=5", "train.token_budget=64")
    groups = make_groups()
    for group, sample in ((0, 1), (2, 3), (3, 0)):
        completions = groups[group].completions
        completions[sample] = replace(completions[sample], token_ids=[], rollout_logprobs=[], mask=[], text="")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    flat = reference_logprobs(model, groups)
    logprobs, mask = rows(flat, groups), rows(torch.ones_like(flat), groups).bool()
    assert not mask.any(1)[[1, 11, 12]].any() and mask.any(1).sum() == 13
    advantages = torch.tensor([a for g in groups for a in g.advantages])
    loss = LossConfig(aggregate=aggregate)
    policy_loss(logprobs, logprobs.detach(), advantages, mask, count(groups), loss, 5).loss.backward()
    assert_close(gradients(run, groups), {n: p.grad for n, p in Policy(model).named_parameters() if p.grad is not None})
    metrics = group_metrics(groups) | run.updater.step(groups)
    assert all(math.isfinite(value) for value in metrics.values()), metrics


@pytest.mark.faults
@pytest.mark.parametrize("more", [[], ["loss.kl_coef=0.1", "loss.entropy_coef=0.1"]])
def test_a_step_of_empty_completions_goes_on(build, more):
    run, groups = build(*more), make_groups()
    for group in groups:
        group.completions = [replace(c, token_ids=[], rollout_logprobs=[], mask=[]) for c in group.completions]
    before = weights(run)
    metrics = group_metrics(groups) | run.updater.step(groups)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["completions/mean_length"] == 0
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert_unmoved(run, before)


@pytest.mark.faults
@pytest.mark.parametrize("more", [[], ["loss.kl_coef=0.1", "loss.entropy_coef=0.1"]])
def test_a_step_whose_completions_are_all_truncated_and_masked_goes_on(build, caplog, more):
    """Loss 0, no update, said; the next step learns as if it had not been."""
    run, groups = build("loss.mask_overlong=true", *more), make_groups()
    before = weights(run)
    metrics = run.updater.step(cut(groups, *((g, i) for g in range(4) for i in range(4))))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert caplog.text.count("no update: in no group do rewards differ between completions that count") == 1
    assert_unmoved(run, before)
    other = build("loss.mask_overlong=true", *more)
    assert run.updater.step(groups)["grad_norm"] == other.updater.step(groups)["grad_norm"] > 0
    assert_unmoved(run, weights(other))


@pytest.mark.faults
def test_a_step_of_equal_rewards_skips_the_update_and_logs_it(build, caplog):
    """Eight times 0.1, whose computed mean is 0.09999999999999999."""
    run = build("rollout.group_size=8", rewards=[lambda completions, **_: [0.1] * len(completions)])
    groups, before = sample_step(run).groups, weights(run)
    assert sum([0.1] * 8) / 8 != 0.1
    for group, values in zip(groups, step_advantages([g.rewards for g in groups]), strict=True):
        assert values == [0.0] * 8
        group.advantages = values
    metrics = group_metrics(groups) | run.updater.step(groups)
    assert metrics["frac_reward_zero_std"] == 1 and metrics["grad_norm"] == metrics["tokens/packed"] == 0
    assert metrics["loss"] == 0 and not {name for name in metrics if name.startswith(("entropy", "clip", "sampling"))}
    assert caplog.text.count("no update: in no group do rewards differ between completions that count") == 1
    assert_unmoved(run, before)


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
        run = build("rollout.max_completion_tokens=16", *more)
        groups = sample_step(run).groups
        completions = [c for g in groups for c in g.completions]
        ended = [c for c in completions if c.finish_reason == "stop"]
        assert len(ended) > 4 and all(c.token_ids[-1] == eos and c.mask[-1] for c in ended)
        for group, values in zip(groups, step_advantages([g.rewards for g in groups]), strict=True):
            group.advantages = values
        batches = run.updater.micro_batches(groups)
        trained = [c for g in groups if run.updater.trains_on(g) for c in g.completions]
        in_loss = sum(int((b.unpack(b.target_ids) == eos)[b.mask].sum()) for b in batches)
        assert in_loss == sum(c.finish_reason == "stop" for c in trained) > 0
        metrics.append(run.updater.step(groups))
        assert metrics[-1]["grad_norm"] > 0
    # Not the gradient norm: transformers gives the pad token's row of the embedding no gradient as an input.
    for name in ("loss", "entropy", "tokens/packed", "sampling/importance_sampling_ratio/mean"):
        assert metrics[0][name] == metrics[1][name], name
