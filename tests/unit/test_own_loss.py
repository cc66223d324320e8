"""``loss.function``: the user's loss gets the inputs of ours, and its gradient is what trains."""

from __future__ import annotations

import pytest
import torch

from pgrpo.algorithm.loss import Counts, policy_loss
from pgrpo.config import ConfigError, LossConfig
from pgrpo.training.own_loss import loss_function

FUNCTIONS = """
from pgrpo.algorithm.loss import policy_loss
def ours(**inputs): return policy_loss(**inputs)
def reinforce(*, mask_BR, logprobs_BR, counts, advantages_BR, unused=0):
    return -(advantages_BR * logprobs_BR)[mask_BR].sum() / counts.tokens
def wants_more(logprobs_BR, values_BR): ...
def by_place(logprobs_BR, /): ...
def constant(mask_BR): return mask_BR.sum() * 1.0
def rows(logprobs_BR): return logprobs_BR.sum(-1)
def nothing(logprobs_BR): return None
"""


@pytest.fixture
def named(tmp_path):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    return lambda name, **keys: loss_function(LossConfig(function=f"{tmp_path}/own.py:{name}", **keys))


def inputs(**keys):
    generator = torch.Generator().manual_seed(0)
    logprobs, old, ref, sampler = torch.randn(4, 3, 5, generator=generator)
    return {
        "logprobs_BR": logprobs.requires_grad_(),
        "old_logprobs_BR": old,
        "advantages_BR": torch.randn(3, 5, generator=generator),
        "mask_BR": torch.rand(3, 5, generator=generator) < 0.7,
        "counts": Counts(tokens=17, samples=6),
        "config": LossConfig(kl_coef=0.1, entropy_coef=0.01, rollout_correction="token_mask", **keys),
        "max_completion_tokens": 5,
        "rollout_logprobs_BR": sampler,
        "ref_logprobs_BR": ref,
        "entropy_BR": torch.rand(3, 5, generator=generator),
    }


def test_without_a_function_it_is_ours():
    assert loss_function(LossConfig()) is policy_loss


def test_ours_by_way_of_a_file_is_the_same_to_the_last_bit(named):
    direct, by_file = inputs(), inputs()
    wanted, got = policy_loss(**direct), named("ours")(**by_file)
    wanted.loss.backward()
    got.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    assert torch.equal(direct["logprobs_BR"].grad, by_file["logprobs_BR"].grad)
    assert direct["logprobs_BR"].grad.abs().sum() > 0


def test_a_function_gets_what_it_names_and_its_number_is_the_loss(named):
    given = inputs()
    output = named("reinforce")(**given)
    output.loss.backward()
    grad = given["logprobs_BR"].grad
    assert torch.allclose(grad, torch.where(given["mask_BR"], -given["advantages_BR"] / 17, 0.0))
    assert [float(x) for x in output[1:]] == [0.0] * (len(output) - 1)


@pytest.mark.parametrize(
    ("name", "missing"), [("wants_more", "values_BR"), ("by_place", "logprobs_BR"), ("absent", "absent")]
)
def test_a_function_that_cannot_be_called_is_refused_before_training(named, name, missing):
    with pytest.raises(ConfigError, match=f"loss.function.*`{missing}`"):
        named(name)


@pytest.mark.parametrize("name", ["constant", "rows", "nothing"])
def test_a_result_that_cannot_be_trained_on_is_named(named, name):
    with pytest.raises(RuntimeError, match=f"loss.function=.*own.py:{name} returned .*depends on logprobs_BR"):
        named(name)(**inputs())
