"""Our losses against TRL's and verl's own functions on equal inputs, values and gradients, in float64 (`make release-checks`).

TRL's loss is a method of its trainer: it is called with a stand-in for the trainer that returns given log-probs. What TRL computes
in the middle of a longer method (importance weights, advantages) is cut out of its source and run.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import inspect
import itertools
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pgrpo.algorithm.advantages import compare
from pgrpo.algorithm.loss import Counts, kl_estimate, policy_loss, rollout_correction
from pgrpo.config import LossConfig
from pgrpo.model.logprobs import TeacherRows, token_logprobs
from pgrpo.types import Episode, Group, Prompt

pytestmark = pytest.mark.release
B, R, LENGTH = 6, 9, 12
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def inputs(seed: int, spread: float = 0.4) -> dict[str, Tensor]:
    """[B, R]; completions of different lengths, the last of them empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old = -torch.rand(B, R, generator=generator, dtype=torch.float64) * 3
    lengths = torch.randint(2, R + 1, (B, 1), generator=generator)
    lengths[-1] = 0
    return {
        "logprobs": old + spread * normal(B, R),
        "old": old,
        "ref": old + spread * normal(B, R),
        "rollout": old + spread / 2 * normal(B, R),
        "teacher": old + spread * normal(B, R),
        "entropy": torch.rand(B, R, generator=generator, dtype=torch.float64),
        "advantages": normal(B, 1).expand(B, R).clone(),
        "mask": torch.arange(R) < lengths,
    }


def ours(given: dict[str, Tensor], config: LossConfig) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    leaf = given["logprobs"].clone().requires_grad_()
    counts = Counts(int(given["mask"].sum()), B)
    output = policy_loss(
        leaf, given["old"], given["advantages"], given["mask"], counts, config, LENGTH, rollout_logprobs_BR=given["rollout"],
        ref_logprobs_BR=given["ref"], teacher_logprobs_BR=given["teacher"], entropy_BR=given["entropy"],
    )  # fmt: skip
    return output.loss.detach(), torch.autograd.grad(output.loss, leaf)[0]


def theirs(given: dict[str, Tensor], loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    leaf = given["logprobs"].clone().requires_grad_()
    value = loss(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def report(name: str, pairs: list[tuple[Any, Any]], most: float = 1e-12) -> None:
    """Print the largest difference of values and of gradients, and hold them to ``most``."""
    worst = [
        max((a - b).abs().max().item() for a, b in column)
        for column in zip(*[zip(*p, strict=True) for p in pairs], strict=True)
    ]
    largest = max(b[-1].abs().max().item() for _, b in pairs)
    print(
        f"{name}: {len(pairs)} cases, differences {', '.join(f'{w:.1e}' for w in worst)} (largest entry {largest:.2g})"
    )
    assert all(w <= most for w in worst)


# --- TRL


def lines_of(method: Callable[..., Any], first: str, last: str) -> str:
    """The source of a method from the line that begins with ``first`` to the one before the next that begins with ``last``."""
    lines = inspect.getsource(method).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines) if i > start and line.strip().startswith(last))
    return textwrap.dedent("\n".join(lines[start:end]))


def trl_weights(given: dict[str, Tensor], mode: str, low: float | None, high: float | None) -> Tensor:
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    space = {
        "self": trainer, "torch": torch, "math": math, "mask": given["mask"], "old_per_token_logps": given["old"],
        "sampling_per_token_logps": given["rollout"],
    }  # fmt: skip
    method = GRPOTrainer._generate_and_score_completions
    exec(
        lines_of(method, "per_token_logps_diff =", "# Compute the per-token log probabilities for the reference"), space
    )
    return space["vllm_importance_sampling_ratio"]  # pyright: ignore[reportReturnType]


def trl_loss(given: dict[str, Tensor], weights: Tensor | None = None, **keys: Any) -> tuple[Tensor, Tensor]:
    from trl.trainer.grpo_trainer import GRPOTrainer

    arguments = {"use_bias_correction_kl": True, "delta": None, "steps_per_generation": 1}
    trainer = SimpleNamespace(
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        importance_sampling_level="token", beta=0.0, loss_type="dapo", epsilon_low=0.2, epsilon_high=0.2,
        use_vllm=weights is not None, vllm_importance_sampling_correction=True, model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1, max_completion_length=LENGTH, _entropy_bonus_enabled=False,
        aux_loss_enabled=False, _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
    )  # fmt: skip
    for key, value in keys.items():
        setattr(trainer, key, value)
    trainer.args = SimpleNamespace(**{name: keys.get(name, value) for name, value in arguments.items()})
    batch = {
        "prompt_ids": torch.zeros(B, 1), "prompt_mask": torch.ones(B, 1), "completion_ids": torch.zeros(B, R),
        "completion_mask": given["mask"].int(), "advantages": given["advantages"], "old_per_token_logps": given["old"],
        "sampling_per_token_logps": given["rollout"], "ref_per_token_logps": given["ref"],
        "importance_sampling_ratio": weights, "num_items_in_batch": given["mask"].sum(),
    }  # fmt: skip

    def loss(leaf: Tensor) -> Tensor:
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (leaf, given["entropy"], None)
        return GRPOTrainer._compute_loss(trainer, None, batch)  # pyright: ignore[reportArgumentType]

    return theirs(given, loss)


AGGREGATES = {"dapo": "token", "grpo": "sample", "dr_grpo": "constant"}


def test_trl_dual_clip() -> None:
    pairs = []
    for seed, (kind, aggregate), delta in itertools.product(range(5), AGGREGATES.items(), (1.25, 1.5, 3.0)):
        given = inputs(seed)
        config = LossConfig(clip_dual=delta, aggregate=aggregate)  # pyright: ignore[reportArgumentType]
        pairs.append((ours(given, config), trl_loss(given, loss_type=kind, delta=delta)))
    report("TRL delta = clip_dual", pairs)


def test_trl_kl() -> None:
    for corrected in (True, False):
        pairs = []
        for seed, (kind, aggregate) in itertools.product(range(5), AGGREGATES.items()):
            given = inputs(seed)
            config = LossConfig(kl_coef=0.3, kl_correction=corrected, aggregate=aggregate)  # pyright: ignore[reportArgumentType]
            pairs.append(
                (ours(given, config), trl_loss(given, loss_type=kind, beta=0.3, use_bias_correction_kl=corrected))
            )
        report(f"TRL use_bias_correction_kl={corrected} = kl_correction", pairs)


def test_trl_off_policy_mask() -> None:
    pairs, masked = [], 0
    for seed, threshold in itertools.product(range(8), (0.02, 0.1)):
        given = inputs(seed)
        config = LossConfig(off_policy_threshold=threshold, kl_coef=0.1)
        pairs.append((ours(given, config), trl_loss(given, off_policy_mask_threshold=threshold, beta=0.1)))
        masked += int(not torch.equal(pairs[-1][0][1], ours(given, LossConfig(kl_coef=0.1))[1]))
    report("TRL off_policy_mask_threshold = off_policy_threshold", pairs)
    assert masked > 5


@pytest.mark.parametrize("mode", CORRECTIONS)
def test_trl_importance_sampling_bounds(mode: Any) -> None:
    pairs = []
    for seed, low, high in itertools.product(range(5), (None, 0.5, 0.9), (1.2, 3.0)):
        given = inputs(seed)
        config = LossConfig(rollout_correction=mode, rollout_correction_cap=high, rollout_correction_floor=low or 0.0)
        weights = trl_weights(given, mode, low, high)
        mine, _ = rollout_correction(given["old"], given["rollout"], given["mask"], config)
        torch.testing.assert_close(mine[given["mask"]], weights.expand(B, R)[given["mask"]], rtol=0, atol=1e-14)
        pairs.append((ours(given, config), trl_loss(given, weights)))
    report(f"TRL vllm_importance_sampling_mode={mode}, clip_min, clip_max", pairs)


def test_trl_cispo_and_sequence_ratios() -> None:
    pairs = []
    for seed in range(5):
        given = inputs(seed)
        config = LossConfig(objective="cispo", clip_low=1.0, clip_high=0.5)
        pairs.append((ours(given, config), trl_loss(given, loss_type="cispo", epsilon_high=1.5)))
        config = LossConfig(ratio="sequence", clip_low=0.05, clip_high=0.05, aggregate="sample")
        level = {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.05}
        pairs.append((ours(given, config), trl_loss(given, loss_type="grpo", **level)))
    report("TRL cispo, importance_sampling_level=sequence", pairs)


def groups_of(parts_BK: Tensor, names: list[str], weights: dict[str, float], size: int) -> list[Group]:
    """Groups of ``size`` episodes; NaN stands for a reward that does not apply."""
    episodes = []
    for row in parts_BK.tolist():
        values = {n: None if math.isnan(v) else v for n, v in zip(names, row, strict=True)}
        terms = [weights[n] * v for n, v in values.items() if v is not None]
        episodes.append(Episode([], "", "stop", sum(terms) if terms else None, values))
    prompt = Prompt(0, "", [1])
    return [Group(prompt, episodes[i : i + size]) for i in range(0, len(episodes), size)]


def test_trl_gdpo() -> None:
    from trl.trainer.grpo_trainer import GRPOTrainer, nanstd

    names, pairs = ["a", "b", "c"], []
    code = lines_of(
        GRPOTrainer._generate_and_score_completions, "unscorable_mask =", "# Slice to keep only the local part"
    )
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        parts_BK = torch.randint(0, 3, (16, 3), generator=generator).double() * torch.tensor([1.0, 10.0, 0.3])
        parts_BK[torch.rand(16, 3, generator=generator) < 0.15] = math.nan
        weights = dict(zip(names, (1.0, 0.5, -2.0), strict=True))
        trainer = SimpleNamespace(
            multi_objective_aggregation="normalize_then_sum", scale_rewards="group",
            reward_weights=torch.tensor(list(weights.values()), dtype=torch.float64), reward_funcs=names,
        )  # fmt: skip
        space = {
            "self": trainer, "torch": torch, "nanstd": nanstd, "num_generations": 4, "device": "cpu",
            "rewards_per_func": parts_BK,
        }  # fmt: skip
        exec(code, space)
        config = LossConfig(combine_rewards="normalize_then_sum")
        mine = [a for row in compare(groups_of(parts_BK, names, weights, 4), config, weights) for a in row]
        pairs.append(((torch.tensor(mine, dtype=torch.float64),), (space["advantages"],)))
    report(
        "TRL multi_objective_aggregation=normalize_then_sum = combine_rewards", pairs, most=1e-6
    )  # TRL counts in float32


def test_trl_reverse_kl_over_the_vocabulary() -> None:
    """TRL computes in float32."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    generator = torch.Generator().manual_seed(0)
    rows, wide, narrow, vocabulary, pairs = 40, 24, 16, 301, []

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for temperature in (1.0, 0.7):
        hidden, weight = normal(rows, narrow), normal(vocabulary, narrow)
        teacher_hidden, teacher_weight = normal(rows, wide), normal(vocabulary, wide)
        mask = torch.rand(rows, generator=generator) < 0.8
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, _, _ = _chunked_divergence_loss(
            leaves[0][None],
            teacher_hidden[None],
            leaves[1],
            teacher_weight,
            mask[None].int(),
            1.0,
            temperature=temperature,
        )
        wanted = (loss.detach(), *torch.autograd.grad(loss, leaves))
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        head = SimpleNamespace(weight=teacher_weight, scale=1.0)
        teacher = TeacherRows(teacher_hidden, head, 1 / temperature)  # pyright: ignore[reportArgumentType]
        got = token_logprobs(*leaves, torch.zeros(rows, dtype=torch.long), 1 / temperature, teacher=teacher)  # pyright: ignore
        assert got.kl is not None
        loss = got.kl[mask].mean()
        pairs.append(((loss.detach(), *torch.autograd.grad(loss, leaves)), wanted))
    report("TRL DistillationTrainer beta=1 = teacher_kl=full (float32)", pairs, most=2e-5)


# --- verl


def verl_loss(given: dict[str, Tensor], weights: Tensor | None = None, mode: str = "token-mean", **keys: Any):
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **keys)
    config.global_batch_info.update(
        global_batch_size=B, batch_num_tokens=int(given["mask"].sum()), loss_scale_factor=LENGTH
    )

    def loss(leaf: Tensor) -> Tensor:
        value, _ = compute_policy_loss_vanilla(
            given["old"], leaf, given["advantages"], given["mask"].double(), mode, config, weights
        )
        return value

    return theirs(given, loss)


VERL_MODES = {"token-mean": "token", "seq-mean-token-mean": "sample", "seq-mean-token-sum-norm": "constant"}


def test_verl_dual_clip() -> None:
    pairs = []
    for seed, (mode, aggregate), c in itertools.product(range(5), VERL_MODES.items(), (1.25, 1.5, 3.0)):
        given = inputs(seed)
        config = LossConfig(clip_dual=c, aggregate=aggregate)  # pyright: ignore[reportArgumentType]
        pairs.append((ours(given, config), verl_loss(given, mode=mode, clip_ratio_c=c)))
    report("verl clip_ratio_c = clip_dual", pairs, most=1e-8)  # verl adds 1e-8 to a sample's tokens


def test_verl_rollout_correction() -> None:
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    pairs = []
    for seed, level, bounds in itertools.product(
        range(5), ("token", "sequence"), ((None, 1.3), (0.4, 2.5), (0.2, 4.0))
    ):
        given, (low, high) = inputs(seed), bounds
        threshold = high if low is None else f"{low}_{high}"
        weights, _ = compute_rollout_correction_weights(
            given["old"] - given["rollout"], given["mask"].double(), level, threshold
        )
        mode: Any = f"{level}_{'truncate' if low is None else 'mask'}"
        config = LossConfig(
            rollout_correction=mode, rollout_correction_cap=high, rollout_correction_floor=low, clip_dual=3.0
        )
        pairs.append((ours(given, config), verl_loss(given, weights)))
    report("verl rollout_is, rollout_is_threshold (one bound, lower_upper)", pairs)


def test_verl_kl() -> None:
    """verl clamps k3, which these inputs do not reach. Its k1 has k1's own gradient, its k1+ that of ours."""
    from verl.trainer.ppo.core_algos import kl_penalty

    for name, estimator in (("k1+", "k1"), ("k2", "k2"), ("k3", "k3")):
        pairs = []
        for seed in range(5):
            given = inputs(seed)
            config = LossConfig(kl_estimator=estimator, kl_correction=False)  # pyright: ignore[reportArgumentType]
            got = theirs(given, lambda leaf, g=given, c=config: kl_estimate(g["ref"] - leaf, leaf, c).sum())
            pairs.append((got, theirs(given, lambda leaf, g=given, n=name: kl_penalty(leaf, g["ref"], n).sum())))
        report(f"verl kl_loss_type={name}", pairs)


def test_verl_sampled_distillation() -> None:
    """``use_policy_gradient``: the advantage is minus the log-ratio to the teacher, as in its ``distillation_loss``."""
    from verl.trainer.ppo.core_algos import kl_penalty

    pairs = []
    for seed, (mode, aggregate) in itertools.product(range(5), VERL_MODES.items()):
        given = inputs(seed)
        config = LossConfig(teacher="x", clip_dual=3.0, aggregate=aggregate)  # pyright: ignore[reportArgumentType]
        advantages = -kl_penalty(given["logprobs"], given["teacher"], "k1")
        alone = given | {"advantages": torch.zeros_like(advantages)}
        pairs.append((ours(alone, config), verl_loss(given | {"advantages": advantages}, mode=mode)))
    report("verl distillation k1, use_policy_gradient = teacher_kl=sampled", pairs, most=1e-8)


def test_verl_gdpo() -> None:
    """verl whitens over tokens, where all completions are as long: its count of values is R times ours, less 1 in both. It adds
    1e-6 and 1e-8 to deviations, we add 1e-4."""
    from verl.trainer.ppo.core_algos import compute_gdpo_outcome_advantage

    names, weights, pairs = ["a", "b"], {"a": 1.0, "b": 0.5}, []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        parts_BK = torch.rand(16, 2, generator=generator).double() * torch.tensor([1.0, 10.0])
        index = np.repeat(np.arange(4), 4)
        mask = torch.ones(16, R)
        wanted, _ = compute_gdpo_outcome_advantage(
            torch.zeros(16, R), mask, index, config={"gdpo_reward_keys": names, "gdpo_reward_weights": [1.0, 0.5]},  # pyright: ignore
            non_tensor_batch={n: parts_BK[:, k].numpy() for k, n in enumerate(names)},
            batch={"prompts": torch.zeros(16, 1), "attention_mask": torch.ones(16, 1 + R).long()},
        )  # fmt: skip
        config = LossConfig(combine_rewards="normalize_then_sum")
        mine = [a for row in compare(groups_of(parts_BK, names, weights, 4), config, weights) for a in row]
        fewer = math.sqrt((16 / 15) / (16 * R / (16 * R - 1)))
        pairs.append(((torch.tensor(mine, dtype=torch.float64) * fewer,), (wanted[:, 0].double(),)))
    report("verl adv_estimator=gdpo = combine_rewards", pairs, most=2e-3)
