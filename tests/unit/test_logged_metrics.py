"""Every number that two steps of a real run log, against an independent calculation from its completions and the untouched
transformers model at the weights of each update."""

from __future__ import annotations

import json
import math
import re
import resource
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pgrpo
from pgrpo import grpo
from pgrpo.attention.choose import UPDATE_FLOPS_PER_NS

ROOT = Path(__file__).parents[2]
G, KL_COEF, TOP_K, LR = 4, 0.3, 6, 0.02
KEYS = [
    "train.steps=2", "rollout.prompts_per_step=4", f"rollout.group_size={G}", f"rollout.top_k={TOP_K}", "train.epochs_per_step=2",
    f"loss.kl_coef={KL_COEF}", f"optim.lr={LR}", "optim.warmup_steps=4", "track.completions=1000", "track.console=false",
    "eval.every=0", "rewards.functions=[{function: exact_match, weight: 0.5}]",
]  # fmt: skip
DESIGN = """
reward reward_std rewards/has_one/mean rewards/exact_match/mean frac_reward_zero_std completions/mean_length
completions/clipped_ratio clip_ratio/low_mean clip_ratio/high_mean entropy kl sampling/sampling_logp_difference/mean
sampling/sampling_logp_difference/max sampling/importance_sampling_ratio/mean loss grad_norm lr tokens/packed tokens/repeated
tokens/rho perf/tflops perf/tokens_per_s perf/peak_memory_gib time/rollout time/reward time/old_logprobs time/update
time/weight_sync time/step
"""
"""Names that users rely on. perf/mfu needs a device whose peak is known: a GPU."""


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """Rows of metrics.jsonl, groups of rows of completions.jsonl by step, and weights and gradient norm before each update."""
    torch.set_num_threads(1)
    updates, ids, clip = [], {}, grpo.clip_gradients

    def has_one(prompts, completions, completion_ids, **_):
        for prompt, own in zip(prompts, completion_ids, strict=True):
            ids.setdefault(prompt, []).append(own)  # text would not tell a <pad> that a random model samples
        return [float("1" in text) for text in completions]

    def watched(policy, limit):
        named = {name.removeprefix("model."): p for name, p in policy.named_parameters()}
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in named.values()))
        updates.append(({name: p.detach().clone() for name, p in named.items()}, norm))
        return clip(policy, limit)

    folder = tmp_path_factory.mktemp("logged") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "clip_gradients", watched)
        patch.setitem(UPDATE_FLOPS_PER_NS, "cpu", 0.0)  # every beginning is shared, whatever it is worth
        pgrpo.train("quickstart", [f"model.path={tiny_model}", f"run_dir={folder}", *KEYS], rewards=[has_one])
    rows, samples = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "completions")
    )
    for sample in samples:
        sample["ids"] = ids[sample["prompt"]].pop(0)
    assert not any(ids.values())
    steps = [[s for s in samples if s["step"] == step] for step in (1, 2)]
    return (
        rows,
        [[own[i : i + G] for i in range(0, len(own), G)] for own in steps],
        [updates[:2], updates[2:]],
        tiny_model,
    )


def token_ids(sample, tokenizer):
    return tokenizer(sample["prompt"]).input_ids, sample["ids"]


@torch.no_grad()
def log_probs(model, weights, samples, tokenizer):
    """Log-probs [R, V] of each sample's completion, from the untouched model, one unpadded sample at a time."""
    if weights is not None:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}
    found = []
    for sample in samples:
        prompt, completion = token_ids(sample, tokenizer)
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.double().log_softmax(-1))
    return found


def test_all_of_the_design_are_logged_and_nothing_is_null(run):
    for row in run[0]:
        assert set(DESIGN.split()) <= row.keys()
        assert all(value is not None for value in row.values())
    assert "perf/mfu" not in run[0][0]  # of a CPU nobody knows the peak


def test_numbers_of_rewards_and_lengths(run):
    rows, steps, _, model = run
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row, groups in zip(rows, steps, strict=True):
        samples = [s for group in groups for s in group]
        assert len(groups) == 4 and len(samples) == 16
        assert all(len({s["prompt"] for s in group}) == 1 for group in groups)
        totals = [[float("1" in s["completion"]) + 0.5 * s["parts"]["exact_match"] for s in group] for group in groups]
        assert [[s["reward"] for s in group] for group in groups] == totals
        lengths = [len(token_ids(s, tokenizer)[1]) for s in samples]
        expected = {
            "reward": fmean(s["reward"] for s in samples),
            "reward_std": fmean(map(stdev, totals)),
            "frac_reward_zero_std": fmean(len(set(group)) == 1 for group in totals),
            "rewards/has_one/mean": fmean("1" in s["completion"] for s in samples),
            "rewards/exact_match/mean": fmean(s["parts"]["exact_match"] for s in samples),
            "completions/mean_length": fmean(lengths),
            "completions/clipped_ratio": fmean(s["finish_reason"] == "length" for s in samples),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert len({row["reward"] for row in rows}) == 2  # or this would test little


def test_numbers_of_the_updates(run):
    rows, steps, all_updates, path = run
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    clipped = 0.0
    for step, (row, groups, updates) in enumerate(zip(rows, steps, all_updates, strict=True)):
        samples = [s for group in groups for s in group]
        ids = [torch.tensor(token_ids(s, tokenizer)[1]) for s in samples]
        initial = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        advantages = torch.cat(
            [torch.full((len(i),), s["advantage"]) for s, i in zip(samples, ids, strict=True)]
        ).double()

        def at(weights, which, samples=samples, ids=ids):
            """[N, V] over all completion tokens, and [N] of those that were sampled."""
            table = torch.cat(log_probs(which, weights, samples, tokenizer))
            return table, table.gather(1, torch.cat(ids)[:, None])[:, 0]

        _, ref = at(None, initial)
        _, old = at(updates[0][0], model)
        means: dict[str, list[float]] = {}
        for weights, norm in updates:
            table, now = at(weights, model)
            ratio = (now - old).exp()
            gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            kl = ratio * ((ref - now).exp() - (ref - now) - 1)
            numbers = {
                "loss": (KL_COEF * kl - gain).mean(),
                "kl": kl.mean(),
                "entropy": -(table.exp() * table).sum(-1).mean(),
                "clip_ratio/low_mean": ((ratio < 0.8) & (advantages < 0)).double().mean(),
                "clip_ratio/high_mean": ((ratio > 1.2) & (advantages > 0)).double().mean(),
                "grad_norm": norm,
            }
            for name, value in numbers.items():
                means.setdefault(name, []).append(float(value))
        expected = {name: fmean(values) for name, values in means.items()}
        # The sampler is the policy: which tokens it drew from (TOP_K, a temperature) does not make its log-probs differ.
        expected |= {
            "sampling/sampling_logp_difference/mean": 0.0,
            "sampling/sampling_logp_difference/max": 0.0,
            "sampling/importance_sampling_ratio/mean": 1.0,
            "sampling/nonfinite_logprobs": 0.0,
            "lr": LR * (step + 1) / 4,
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=2e-4, abs=5e-6)
        clipped += expected["clip_ratio/low_mean"] + expected["clip_ratio/high_mean"]
        assert expected["kl"] > 1e-3
    assert clipped > 0.05  # or this would test little


def test_numbers_of_tokens_speed_and_time(run):
    rows, steps, _, path = run
    tokenizer = AutoTokenizer.from_pretrained(path)
    for row, groups in zip(rows, steps, strict=True):
        pairs = [token_ids(s, tokenizer) for group in groups for s in group]
        rows_of = {tuple((prompt + ids)[: i + 1]) for prompt, ids in pairs for i in range(len(prompt + ids))}
        scored = {tuple(prompt + ids[: i + 1]) for prompt, ids in pairs for i in range(len(ids))}
        packed, repeated = len(rows_of), sum(len(prompt + ids) for prompt, ids in pairs)
        # As in test_commands.py: the matrices of two layers, the head over completion tokens, scores and their use.
        flops = 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256) * packed + 2 * 64 * 14 * len(scored)
        flops += 4 * 2 * 64 * sum(map(len, rows_of))
        prompts = [tokenizer(group[0]["prompt"]).input_ids for group in groups]
        in_prompts = {tuple(p[: i + 1]) for p in prompts for i in range(len(p))}
        assert row["tokens/shared_above_prompt"] == 2 * (sum(map(len, prompts)) - len(in_prompts))
        assert row["tokens/packed"] == 2 * packed and row["tokens/repeated"] == 2 * repeated  # two epochs
        assert row["tokens/rho"] == pytest.approx(repeated / packed)
        assert row["perf/tokens_per_s"] == pytest.approx(2 * packed / row["time/step"])
        assert row["perf/tflops"] == pytest.approx(
            2 * 3 * flops / (row["time/update"] + row["time/old_logprobs"]) / 1e12
        )
        assert 0.05 < row["perf/peak_memory_gib"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        parts = [row[f"time/{name}"] for name in ("rollout", "reward", "old_logprobs", "update")]
        assert min(parts) >= 0 and min(parts[0], parts[1], parts[3]) > 0
        assert 0.8 * row["time/step"] < sum(parts) <= row["time/step"]
        assert row["time/weight_sync"] == 0  # the policy itself samples


def test_the_page_about_runs_has_every_metric(run):
    """Those of a real run, and all names in the source that are not of a section of another page."""
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    table = page[page.index("## Metrics") : page.index("## Stopping")]
    shown = set(re.findall(r"`([a-z_0-9/]+)`", table.replace("/NAME/", "/has_one/")))
    shown |= {"step", "rewards/exact_match/mean"}
    logged = {name for row in run[0] for name in row}
    assert {name for name in logged if not name.startswith("eval/")} <= shown
    source = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "pgrpo").rglob("*.py")))
    sections = "resampling|sampling|tokens|time|perf|canary|clip_ratio|completions|rollout|teacher"
    named = set(re.findall(rf'"((?:{sections})/[a-z_/]+)"', source)) - {"tokens/s", "time/"}
    assert named - shown == set()
    assert {name for name in shown if "/" in name} - named - logged <= {
        "sampling/frac_truncated",
        "sampling/frac_masked",
    }
