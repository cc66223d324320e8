"""Images in packed batches: exact against the untouched model, each image computed once, never merged with another."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from seeing import CONFIGS

from pgrpo.admission import proof
from pgrpo.admission.compare import difference, gradients, reference_logprobs
from pgrpo.admission.proof import prove
from pgrpo.admission.reach import LONG
from pgrpo.admission.shrink import few_layers
from pgrpo.admission.vision import RandomImages, image_bugs, reference_inputs
from pgrpo.config import ModelConfig
from pgrpo.model.families.vision import WholeImages, freeze, tower_parameters
from pgrpo.model.lora import add_adapters
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.dims import decoder_layers
from pgrpo.types import Image, PromptImages, Sample
from pgrpo.vision.processors import positions_3d
from pgrpo.vision.rows import placeholder_runs, token_keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", CONFIGS)
def test_grouped_attention_is_exact_with_images(name):
    """Float64, the untouched model one sample a call: log-probs and all gradients, the tower's and the projector's too; and bugs of
    images are seen."""
    found = prove(CONFIGS[name])
    assert found.refusal == ""
    assert found.logprob < 1e-11
    assert found.gradient < 1e-11
    assert found.bugs.keys() >= image_bugs(CONFIGS[name]).keys()
    assert min(found.bugs.values()) > 1e-2
    assert found.not_kept == "the model sees images"
    assert len(decoder_layers(proof.twins(few_layers(proof.shrink(CONFIGS[name])), 0)[1])) <= 2


def test_the_proof_of_qwen3_5_has_layers_of_both_kinds():
    """Linear layers carry what an image told them from node to node."""
    kinds = few_layers(proof.shrink(CONFIGS["qwen3_5"])).text_config.layer_types
    assert {*kinds} == {"linear_attention", "full_attention"}


@pytest.mark.parametrize("window", [True, False])
def test_what_the_proof_cannot_see_of_images_is_refused(monkeypatch, window):
    """A model whose images' rows see each other, but for one thing: the rows ahead, or the window."""
    attend = WholeImages.attend

    def broken(self, *args, **kwargs):
        if window:
            return attend(self, *args, **kwargs | {"window": None})
        return attend(replace_blocks(self), *args, **kwargs)

    def replace_blocks(whole):
        return WholeImages(whole.layout, [])

    monkeypatch.setattr(WholeImages, "attend", broken)
    assert "log-probs differ" in prove(CONFIGS["gemma3"]).refusal


@pytest.mark.parametrize(
    ("name", "changes"), [("qwen3_vl", "rows"), ("gemma3", "rows"), ("qwen2_5_vl", "layer"), ("idefics3", "layer")]
)
def test_models_with_images_are_proven_at_lengths_and_in_layers_that_no_config_names(name, changes, monkeypatch):
    layer = type(decoder_layers(proof.twins(proof.shrink(CONFIGS[name]), 0)[1])[0])
    forward = layer.forward

    def changed(self, hidden_states, *args, **kwargs):
        if changes == "rows" and hidden_states.shape[1] > 1024:
            hidden_states = 1.5 * hidden_states
        if changes == "layer" and self.self_attn.layer_idx == 7:
            hidden_states = hidden_states * (1 + hidden_states.mean())
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", changed)
    where = {
        "rows": rf"in samples of {LONG} tokens .* hidden states part in model\.\S+\.0\.",
        "layer": r"in a copy with all of its \d+ layers .* hidden states part in model\.\S+\.7\.",
    }
    assert re.search(where[changes], prove(CONFIGS[name]).refusal)


@pytest.fixture(scope="module")
def qwen():
    """Twins in float64, their random images and samples."""
    with torch.random.fork_rng():
        config = proof.shrink(CONFIGS["qwen3_vl"])
        untouched, grouped = proof.twins(config, 0)
        images = RandomImages(config, untouched, 0)
        samples = images.samples(config.get_text_config().vocab_size)
    return untouched, grouped, images, samples


def policy_of(qwen) -> Policy:
    policy = Policy(qwen[1])
    assert policy.vision is not None
    policy.vision.pixels = qwen[2].pixels
    return policy


def test_the_tower_runs_once_a_distinct_image(qwen):
    """Four prompts with four images, three of them distinct. Frozen: one call for all steps; trained: one call a forward."""
    samples = qwen[3]
    policy = policy_of(qwen)
    vision, batch = policy.vision, build_batch(Forest.of(samples))
    assert vision is not None
    before = policy(batch).logprobs
    policy(batch)
    assert (vision.calls, vision.images) == (2, 6)
    freeze(policy.model, tower=True, projector=True)
    try:
        vision.calls = vision.images = 0
        frozen = policy(batch).logprobs
        torch.testing.assert_close(frozen, before, rtol=0, atol=0)
        policy(build_batch(Forest.of(samples[:3])))
        with torch.no_grad():
            policy(build_batch(Forest.repeated(samples)))
        assert (vision.calls, vision.images) == (1, 3)
        frozen.sum().backward()
        assert all(p.grad is None for _, p in tower_parameters(policy.model, vision.family))
        assert decoder_layers(policy.model)[0].get_parameter("mlp.up_proj.weight").grad is not None
    finally:
        policy.model.requires_grad_(True).zero_grad()


def test_only_the_projector_is_trained(qwen):
    policy = policy_of(qwen)
    freeze(policy.model, tower=True, projector=False)
    try:
        trained = {n for n, p in policy.model.named_parameters() if p.requires_grad and "visual" in n}
        assert trained
        assert all("merger" in name for name in trained)
        policy(build_batch(Forest.of(qwen[3]))).logprobs.sum().backward()
        grads = {n: p.grad for n, p in policy.model.named_parameters() if "visual" in n}
        assert {n for n, g in grads.items() if g is not None} == trained
    finally:
        policy.model.requires_grad_(True).zero_grad()


def test_a_rank_without_images_runs_a_trained_tower_on_a_dummy(qwen):
    """Its gradients are zeros, not missing: FSDP reduces what every rank has."""
    policy, untouched = policy_of(qwen), qwen[0]
    assert policy.vision is not None
    text = [sample for sample in qwen[3] if sample.images is None]
    batch, wanted = build_batch(Forest.of(text)), reference_logprobs(untouched, text)
    policy.vision.dummy = lambda: qwen[2].pixels("a")
    try:
        found = difference(policy, batch, wanted, gradients(wanted, untouched))
        assert max(found.logprob, found.gradient) < 1e-4
        assert policy.vision.calls == 1
        policy(batch).logprobs.sum().backward()
        tower = [p for _, p in tower_parameters(policy.model, policy.vision.family)]
        assert all(p.grad is not None and not p.grad.any() for p in tower)
    finally:
        policy.model.zero_grad()
    with torch.no_grad():
        policy(batch)
    assert policy.vision.calls == 2


def test_placeholders_have_no_probability(qwen):
    """Neither in log-probs nor in what the next token is drawn from, nor in the gradient."""
    policy, samples = policy_of(qwen), qwen[3][:3]
    config = policy.model.config
    assert policy.head.banned == sorted({config.image_token_id, config.video_token_id})
    ends = replace(samples[0], token_ids=[config.image_token_id], mask=[True], rollout_logprobs=[0.0], advantages=[0.0])
    batch = build_batch(Forest.of([*samples, ends]))
    found = policy(batch, entropy=True)
    assert found.logprobs[-1] < -1e20
    assert found.entropy is not None
    assert found.entropy.isfinite().all()
    wanted = reference_logprobs(qwen[0], samples, more=reference_inputs(qwen[0], qwen[2]))
    torch.testing.assert_close(found.logprobs[: len(wanted)], wanted, rtol=0, atol=1e-5)
    (found.logprobs[: len(wanted)].sum() + found.entropy.sum()).backward()
    try:
        head = policy.head.weight.grad
        assert head is not None
        assert not head[policy.head.banned].any()
        assert head.isfinite().all()
    finally:
        policy.model.zero_grad()


def test_adapters_are_in_the_language_model_alone(qwen):
    with torch.random.fork_rng():
        _, model = proof.twins(proof.shrink(CONFIGS["smolvlm"]), 0)  # whose tower has q_proj, k_proj, v_proj too
    add_adapters(model, ModelConfig(path="", lora_rank=2), seed=0)
    adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert adapters
    assert all("text_model.layers" in name for name in adapters)
    assert {name.partition(".lora_")[0].rpartition(".")[2] for name in adapters} >= {"q_proj", "o_proj", "up_proj"}


def sample(ids: list[int], *images: tuple[str, int, int], completion: int = 9) -> Sample:
    found = tuple(Image(key, ((start, end),)) for key, start, end in images)
    return Sample([*ids], [completion], [True], [0.0], images=PromptImages(found, []) if found else None)


def test_prompts_share_an_image_and_never_two():
    """Token ids are equal in all of them."""
    ids = [1, 5, 5, 5, 2]
    same = [sample(ids, ("a", 1, 4)), sample(ids, ("a", 1, 4), completion=8)]
    other = sample(ids, ("b", 1, 4), completion=7)
    assert Forest.of(same).rows == 5 + 2
    assert Forest.of([*same, other]).rows == 5 + 2 + 4 + 1
    assert Forest.of([sample(ids), *same]).rows == 1 + 4 + 1 + 4 + 2  # whose tokens are text
    keys = token_keys([*same, other])
    assert (keys[0][:5] == keys[1][:5]).all()
    assert (keys[0][:5] != keys[2][:5]).tolist() == [False, True, True, True, False]
    batch = build_batch(Forest.of([*same, other]))
    assert batch.images is not None
    assert batch.images.keys == ["a", "b"]
    assert batch.images.counts == [3, 3]
    assert batch.inputs["input_ids"].index_select(0, batch.images.rows).tolist() == [5] * 6
    assert batch.images.features.tolist() == [0, 1, 2, 3, 4, 5]


def test_two_images_that_follow_each_other_are_told_apart():
    assert placeholder_runs([5, 5, 5, 1, 5], 5, [[2], [1], [1]]) == [((0, 2),), ((2, 3),), ((4, 5),)]
    assert placeholder_runs([5, 5, 1, 5], 5, [[2, 1]]) == [((0, 2), (3, 4))]
    for counts in ([[2]], [[3], [1]], [[2], [1], [1]], [[1], [1], [2]]):
        with pytest.raises(ValueError, match="image"):
            placeholder_runs([5, 5, 1, 5], 5, counts)


def test_positions_are_those_of_qwen(qwen):
    """Of one to three images of different shapes, with text behind them or none."""
    model = qwen[0].base_model
    token = qwen[0].config.image_token_id
    for grids in ([(2, 3)], [(4, 1), (1, 2)], [(3, 3), (2, 2), (1, 5)]):
        ids = [1, 2]
        images = []
        for rows, columns in grids:
            images.append(Image("", ((len(ids), len(ids) + rows * columns),)))
            ids += [token] * (rows * columns) + [3] * (rows > 1)
        tokens = torch.tensor([ids])
        wanted, _ = model.get_rope_index(
            tokens, mm_token_type_ids=spaced(tokens, images), image_grid_thw=torch.tensor([[1, 2 * r, 2 * c] for r, c in grids])
        )  # fmt: skip
        assert positions_3d(len(ids), images, grids) == wanted[:, 0].tolist()


def spaced(tokens, images):
    kinds = torch.zeros_like(tokens)
    for image in images:
        for start, end in image.runs:
            kinds[:, start:end] = 1
    return kinds
