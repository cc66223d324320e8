"""The reference model of the KL term: when one is loaded, in what precision it is held, and that host memory changes nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pgrpo.admission.compare import tokens_as_samples
from pgrpo.config import load_config
from pgrpo.distributed.world import World, start
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.flops import ModelDims
from pgrpo.training.build import Learner, build
from pgrpo.training.optim import build_optimizer
from pgrpo.training.place import place_policy, place_reference
from pgrpo.training.update import refresh_reference


def config_of(tiny_model, tmp_path, *overrides):
    torch.set_num_threads(1)
    return load_config(
        "quickstart", [f"model.path={tiny_model}", f"run_dir={tmp_path}/run", "eval.every=0", *overrides]
    )


@pytest.mark.parametrize(
    ("overrides", "models"),
    [
        ((), 1),
        (("loss.entropy_coef=0.1",), 1),
        (("loss.kl_coef=0.1",), 2),
        (("loss.kl_coef=0.1", "model.lora_rank=2"), 1),
        (("loss.preset=grpo",), 2),
        (("loss.preset=grpo", "loss.kl_coef=0"), 1),
    ],
)
def test_a_reference_is_loaded_only_where_a_kl_term_needs_one(tiny_model, tmp_path, monkeypatch, overrides, models):
    loaded = []
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
    with build(config_of(tiny_model, tmp_path, *overrides), World(0, 1, torch.device("cpu"))) as parts:
        assert len(loaded) == models
        assert (parts.learner.reference is None) == (
            "loss.kl_coef=0.1" not in overrides and overrides != ("loss.preset=grpo",)
        )


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_two_bytes_a_weight_give_the_bits_of_float32_masters(tiny_model, tmp_path, offload):
    """In bfloat16, sharded by FSDP2: as loaded, and refreshed with weights that bfloat16 does not hold."""
    config = config_of(tiny_model, tmp_path, "model.dtype=bfloat16", "loss.kl_coef=0.1", "loss.ref_refresh_every=1")
    config.loss.ref_offload = offload  # refused on a CPU by check_device; FSDP2 does there what it does on a GPU
    batch = build_batch(Forest.of(tokens_as_samples([[3, 4, 5], [6, 7]], [[[8, 9], [10, 3, 4]], [[5], [6, 6, 6]]])))
    with start() as world, torch.no_grad():
        policy, reference = place_policy(config, world), place_reference(config, world)
        assert {p.element_size() for p in reference.parameters()} == {2}
        assert {p.element_size() for p in policy.parameters()} == {4}
        assert not any(p.requires_grad for p in reference.parameters())
        assert torch.equal(reference(batch).logprobs, policy(batch).logprobs)
        dims = ModelDims.from_config(policy.model.config)
        learner = Learner(config, world, policy, reference, build_optimizer(policy, config.optim), dims)
        refresh_reference(learner)  # also makes shards of what the forwards gathered
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.3 * torch.rand((), generator=generator).item())
        before = reference(batch).logprobs
        assert (before - policy(batch).logprobs).abs().max() > 1e-2
        refresh_reference(learner)
        assert torch.equal(reference(batch).logprobs, policy(batch).logprobs)


def test_offload_reaches_fsdp(tiny_model, tmp_path, monkeypatch):
    """Every sharded module of the reference, and none of the policy's."""
    from pgrpo.distributed import fsdp

    homes = []
    shard = fsdp.fully_shard
    monkeypatch.setattr(
        fsdp, "fully_shard", lambda *a, **k: homes.append(type(k["offload_policy"]).__name__) or shard(*a, **k)
    )
    config = config_of(tiny_model, tmp_path, "model.dtype=bfloat16", "loss.kl_coef=0.1")
    config.loss.ref_offload = "cpu"
    with start() as world:
        place_policy(config, world)
        assert homes == ["OffloadPolicy"] * 3  # two layers and the root
        place_reference(config, world)
    assert homes[3:] == ["CPUOffloadPolicy"] * 3
