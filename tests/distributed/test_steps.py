"""A step on several ranks: what is scored, who is sent what, and which weights are whole when it is over."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from making import episode, group
from stepping import (
    forwards_without_a_gradient,
    gathered_after_a_failed_forward,
    peaks,
    sampled_step,
    staying_of_unlike_gpus,
)

from pgrpo.attention.choose import AttentionChoice
from pgrpo.config import load_config
from pgrpo.distributed import world as distributed
from pgrpo.distributed.world import World
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.hub import load_hf_config
from pgrpo.rollout.base import sample_seeds
from pgrpo.training.update import micro_batches
from pgrpo.types import Prompt


@pytest.mark.parametrize(("size", "together"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_every_completion_is_scored_and_counted_once(processes, size, together):
    """Two rounds of resampling, of one prompt each: all ranks decode, and only one of them a prompt that anybody asked for."""
    on_ranks = processes(size)(sampled_step, together)
    seeds = [sample_seeds(0, 5, i, group_size=2) for i in range(6)]
    texts = [str(seed) for own in seeds for seed in own]
    assert len(set(texts)) == 12
    assert sorted(text for seen, *_ in on_ranks for text in seen) == sorted(texts)
    _, groups, all_groups, metrics = on_ranks[0]
    assert all_groups == [
        (Prompt(i, f"prompt {i}", [1], {"answer": i}), [str(seed) for seed in seeds[i]]) for i in range(6)
    ]
    assert groups == [all_groups[i] for i in (0, 5, 2, 3)]
    assert (metrics["rewards/errors"], metrics["resampling/rounds"], metrics["resampling/groups"]) == (1, 2, 2)
    assert metrics["resampling/frac_reward_zero_std"] == 0
    for _, theirs, all_of_theirs, _ in on_ranks[1:]:
        assert theirs == all_of_theirs == []


def test_objects_travel_over_the_cpu_group(monkeypatch):
    """On GPUs the default group is NCCL's, which would take memory that an awake engine counts on."""
    used = []
    for name in ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "all_reduce"):
        monkeypatch.setattr(distributed.dist, name, lambda *_, name=name, group=None, **__: used.append((name, group)))
    world = World(0, 2, torch.device("cpu"), control="gloo")
    world.from_main(1)
    world.gather([1])
    world.scatter(lambda: [1, 2])
    world.check_stop()
    monkeypatch.setattr(
        distributed.dist,
        "gather_object",
        lambda _, parts, group: used.append(("gather_object", group)) or parts.__setitem__(slice(None), [[], []]),
    )
    world.to_main([1])
    assert {group for _, group in used} == {"gloo"}
    assert [name for name, _ in used] == [
        "broadcast_object_list", "all_gather_object", "all_reduce", "scatter_object_list", "all_reduce", "gather_object"
    ]  # fmt: skip


def test_a_rank_is_sent_no_text(tiny_model):
    config = load_config("quickstart", [f"model.path={tiny_model}"])
    answers = [
        episode([4, 5], 1.0, mask=[True, False], logprobs=[-1.0, -2.0], advantage=0.5, text="a long answer"),
        episode([6], 0.0, logprobs=[-3.0], advantage=-0.5, finish_reason="length", text="another"),
    ]
    prompt = Prompt(3, "much text", [1, 2], {"answer": "42"}, [{"role": "user", "content": "much text"}])
    both = group(prompt, *answers)
    sent = []

    class Sending(World):
        def scatter(self, make):
            sent.extend(make())
            return sent[0]

    learner: Any = SimpleNamespace(
        config=config, world=Sending(0, 1, torch.device("cpu")), policy=SimpleNamespace(attention=AttentionChoice()), most_kept=0,
        dims=ModelDims.from_config(load_hf_config(config.model)),
    )  # fmt: skip
    micro_batches(learner, [both])
    for word in (b"much text", b"42", b"a long answer"):
        assert word in pickle.dumps(both) and word not in pickle.dumps(sent)
    ((forest,),) = sent
    assert forest.samples == both.samples and forest.rows == 2 + 2 + 1
    one, other = forest.samples
    assert (one.token_ids, one.rollout_logprobs, one.mask) == ([4, 5], [-1.0, -2.0], [True, False])
    assert (one.advantages, other.advantages) == ([0.5, 0.5], [-0.5])


def test_the_peak_memory_of_a_step_is_that_of_the_rank_with_the_most(processes):
    assert processes(2)(peaks) == [(2.0, 1.0), (2.0, 2.0)]


@pytest.mark.parametrize("size", [2])
def test_weights_are_shards_after_every_forward_without_a_gradient(processes, size, tiny_model, tmp_path):
    """What a root holds whole lies beside an awake engine. A bare forward leaves it so, and computes the same numbers."""
    for found, same_numbers in processes(size)(forwards_without_a_gradient, tiny_model, tmp_path / "run"):
        assert len(found.pop("a bare forward")) > 1
        assert not any(found.values()) and len(found) == 7
        assert same_numbers


@pytest.mark.parametrize("stay_gathered", [0, 3])
def test_a_failed_forward_leaves_no_weights_gathered_behind_reshard(processes, stay_gathered):
    """A rescued checkpoint has the shards. The root's weights, and those of the layer that failed or of all that ran."""
    ((failed, left),) = processes(1)(gathered_after_a_failed_forward, stay_gathered)
    assert {name.partition(".")[0] for name in failed} == ({"0", "1", "2", "4"} if stay_gathered else {"0", "2", "4"})
    assert left == []


def test_on_all_ranks_the_same_layers_stay_gathered(processes, tiny_model):
    """Gathering is collective; of two GPUs of unlike memory the smaller one has room for a layer less."""
    assert processes(2)(staying_of_unlike_gpus, tiny_model) == [[True, False]] * 2
