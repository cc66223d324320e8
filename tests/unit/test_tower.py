"""What a vision tower costs: FLOPs and memory, against what PyTorch counts and keeps."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from seeing import CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

from pgrpo.admission import proof
from pgrpo.admission.vision import RandomImages
from pgrpo.model.families.vision import Vision, freeze, tower_parameters
from pgrpo.planning import memory
from pgrpo.planning.dims import ModelDims
from pgrpo.planning.tower import TowerDims, tower_layers
from pgrpo.types import Recompute
from pgrpo.vision.families import FAMILIES


def model_of(name: str) -> Any:
    """A small model in float32, with eager attention, whose products PyTorch counts."""
    config = copy.deepcopy(proof.shrink(CONFIGS[name]))
    if name == "gemma3":
        config.vision_config.vision_use_head = False  # as in published ones
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    return model.float()


def vision_of(model: Any) -> Vision:
    """With two images of different shapes."""
    vision = Vision.of(model)
    assert vision is not None
    images = RandomImages(model.config, model, 0)
    for key, shape in (("a", 0), ("b", 1)):
        images.add(key, shape)
    vision.pixels = lambda key: {n: x.float() if x.is_floating_point() else x for n, x in images.pixels(key).items()}
    return vision


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_of_the_tower_are_those_that_torch_counts(name):
    """Forward, and forward with backward; the first layer's input has no gradient, and of features in front of the last layer that
    one has none."""
    model = model_of(name)
    vision, dims = vision_of(model), TowerDims.of(model, FAMILIES[name])
    pixels = [vision.pixels(key) for key in "ab"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vision._run(pixels)
    assert vision.flops == counter.get_total_flops()
    vision.flops = 0
    with FlopCounterMode(display=False) as counter:
        found = vision._run(pixels)
        torch.stack([x.square().sum() for x in (found.rows, *found.deep)]).sum().backward()
    patches = sum(dims.work(one).patches for one in pixels)
    missing = 2 * dims.patch * patches
    if name == "llava_next":  # features come from the last layer but one
        one = replace(dims, layers=1, whole=1, matrices=dims.matrices // dims.layers, patch=0, projector=0)
        missing += 2 * sum(one.flops(one.work(x)) for x in pixels)
    assert vision.flops == counter.get_total_flops() + missing


def test_flops_of_a_trained_projector():
    """The frozen tower in front of it has no backward. The projectors' first norms are trained, so all products have one."""
    model = model_of("qwen3_vl")
    vision = vision_of(model)
    freeze(model, tower=True, projector=False)
    with FlopCounterMode(display=False) as counter:
        found = vision._run([vision.pixels("b")])
        torch.stack([x.square().sum() for x in (found.rows, *found.deep)]).sum().backward()
    assert vision.flops == counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(name, dtype):
    """Distinct tensors that a layer of the tower saves, over the plan's bytes a row of it: of one with sdpa, and of sizes at which
    heads' statistics are little."""
    config = copy.deepcopy(proof.shrink(CONFIGS[name]))
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 128, 512
    model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").to(dtype)
    family = FAMILIES[name]
    dims = TowerDims.of(model, family)
    layer: Any = tower_layers(model, family)[1]
    calls: list[Any] = []
    layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    images = RandomImages(config, model, 0)
    images.add("a", 0)
    pixels = {n: x.to(dtype) if x.is_floating_point() else x for n, x in images.pixels("a").items()}
    with torch.no_grad():
        model.base_model.get_image_features(**pixels)
    (args, kwargs), kept = calls[0], {}
    hidden = (args[0] if args else kwargs.pop("hidden_states")).clone().requires_grad_()

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    constant = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, *args[1:], **kwargs)
    rows = dims.work(pixels).rows
    saved = sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in constant)
    assert (
        0.97 <= saved / rows / dims.layer_activations(dtype.itemsize) <= 1.12
    )  # with float32 cosines and sines of two heads


def test_the_plan_knows_what_of_the_tower_is_trained():
    """A model of Qwen3-VL-4B's shape: 24 layers of 1,024 in the tower, of which a token has four rows."""
    dims, gib = ModelDims.from_config(qwen3_vl_4b()), 2**30
    full: list[Recompute] = ["full" for _ in range(dims.layers)]
    tower = dims.tower
    assert tower is not None
    assert (tower.layers, tower.hidden, tower.deep, tower.rows_a_token) == (24, 1024, 3, 4)

    def plan(**changes: Any) -> memory.MemoryPlan:
        sizes: dict[str, Any] = {"token_budget": 8192, "image_tokens": 4096, "dtype_bytes": 2, "ranks": 8} | changes
        return memory.memory_plan(dims, recompute=full, **sizes)

    frozen, projector, trained = plan(), plan(train_projector=True), plan(train_projector=True, train_vision=True)
    again = plan(train_projector=True, train_vision=True, recompute_vision=True)
    both = tower.parameters + tower.projector_parameters
    assert dims.parameters > both > 4e8
    assert frozen.weights == trained.weights == 4 * dims.parameters / 8 / gib
    assert frozen.gradients == pytest.approx(4 * (dims.parameters - both) / 8 / gib)
    assert projector.moments == pytest.approx(8 * (dims.parameters - tower.parameters) / 8 / gib)
    assert trained.gradients == pytest.approx(4 * dims.parameters / 8 / gib)
    assert trained.layer_backward - frozen.layer_backward == pytest.approx(2 * both / gib)  # before they are reduced
    assert frozen.tower == pytest.approx(4096 * 2560 * 4 * 2 / gib)  # four features a row, in bfloat16
    layer = 4 * 4096 * (8 * 1024 + 7 * 2 * 1024 + 2 * 2 * 4096)  # bytes of 16,384 rows: norms, attention and MLP
    assert frozen.tower_forward == pytest.approx(layer / gib)
    assert trained.tower - projector.tower == pytest.approx(24 * layer / gib)
    assert again.tower - projector.tower == pytest.approx(24 * 4 * 4096 * 1024 * 2 / gib)
    assert trained.update - again.update == pytest.approx(trained.tower - again.tower)
    without = memory.memory_plan(replace(dims, tower=None), recompute=full, token_budget=8192, dtype_bytes=2)
    assert plan(ranks=1).gathered - without.gathered == pytest.approx(2 * both / gib)


def qwen3_vl_4b() -> Qwen3VLConfig:
    text = {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    tower = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560}
    return Qwen3VLConfig(text_config=text, vision_config={**tower, "deepstack_visual_indexes": [5, 11, 17]})


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_that_are_computed_again_have_the_same_gradients(name):
    model = model_of(name)
    vision = vision_of(model)

    def gradients() -> dict[int, torch.Tensor]:
        model.zero_grad()
        found = vision._run([vision.pixels("a")])
        torch.stack([x.square().sum() for x in (found.rows, *found.deep)]).sum().backward()
        parts = enumerate(p.grad for _, p in tower_parameters(model, vision.family))
        return {number: grad.clone() for number, grad in parts if grad is not None}

    before = gradients()
    forwards = []
    for layer in tower_layers(model, vision.family):
        layer.register_forward_pre_hook(lambda *_: forwards.append("hook"))
    first: Any = tower_layers(model, vision.family)[0]
    kind, run = type(first), type(first).forward
    ran = []
    vision.recompute()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", lambda *args, **kwargs: (ran.append(1), run(*args, **kwargs))[1])
        after = gradients()
    assert len(ran) > len(forwards) > 0
    assert before.keys() == after.keys()
    for number, grad in before.items():
        torch.testing.assert_close(after[number], grad, rtol=0, atol=0)
