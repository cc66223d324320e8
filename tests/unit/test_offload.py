"""What leaves a device while vLLM samples comes back as it was, whatever else happens; and whose tensors those are."""

from __future__ import annotations

import re
import resource

import pytest
import torch
from torch import nn

from pgrpo.config import OptimConfig, load_config
from pgrpo.distributed import fsdp
from pgrpo.distributed.world import World, start
from pgrpo.process.pinned import pinning
from pgrpo.rollout.vllm import offload
from pgrpo.rollout.vllm.offload import Offload
from pgrpo.training.engine import resting_tensors
from pgrpo.training.long_samples import HostInputs
from pgrpo.training.offload import OffloadedAdamW
from pgrpo.training.optim import build_optimizer
from pgrpo.training.place import place_reference, place_teacher


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Buffers that tensors begin and end within."""
    monkeypatch.setattr(offload, "PIECE", 1000)
    monkeypatch.setattr(offload, "LEAST", 100)


def trained(world: World, dtype: torch.dtype):
    """Two linear layers after an optimizer step, and their optimizer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(17, 19), nn.Linear(19, 23))
    fsdp.place(module, module, world, dtype)
    optimizer = build_optimizer(module, OptimConfig(lr=0.1))
    step(module, optimizer)
    return module, optimizer


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.manual_seed(1)
    module(torch.randn(5, 17)).float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in resting_tensors(module, optimizer, ("weights", "moments"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["plain", "FSDP2"])
@pytest.mark.parametrize("parts", [("weights",), ("weights", "moments"), ()])
def test_weights_and_moments_come_back_and_training_goes_on_as_without(dtype, parts):
    with start() as world:
        module, optimizer = trained(world, dtype)
        other, other_optimizer = trained(world, dtype)
        before = values(module, optimizer)
        moved = Offload(lambda: resting_tensors(module, optimizer, parts))
        for _ in range(2):  # the buffers are used again
            with moved.away():
                sizes = {
                    part: [t.untyped_storage().nbytes() for t in resting_tensors(module, optimizer, (part,))]
                    for part in ("weights", "moments")
                }
            assert all(torch.equal(a, b) for a, b in zip(values(module, optimizer), before, strict=True))
        biases = {4 * 19, 4 * 23}  # smaller than LEAST
        for part, found in sizes.items():
            assert (set(found) == {0, *biases}) if part in parts else (0 not in found)
        step(module, optimizer)
        step(other, other_optimizer)
        assert all(map(torch.equal, values(module, optimizer), values(other, other_optimizer)))


@pytest.mark.parametrize(
    ("staying", "gone"), [(0, 5), (439, 5), (440, 4), (839, 4), (840, 3), (1239, 3), (1240, 1), (2839, 1), (2840, 0)]
)
def test_what_may_stay_stays_whole_and_the_first_tensors_leave(staying, gone):
    """Bytes: 1,600, 400, 400 and 400, and one of 40 between them that is too small to leave."""
    sizes = 400, 10, 100, 100, 100
    tensors = [torch.arange(float(size)) for size in sizes]
    moved = Offload(lambda: tensors, staying)
    for _ in range(2):
        with moved.away():
            empty = [tensor.untyped_storage().nbytes() == 0 for tensor in tensors]
        assert empty == [size != 10 and i < gone for i, size in enumerate(sizes)]
        assert all(torch.equal(tensor, torch.arange(float(size))) for tensor, size in zip(tensors, sizes, strict=True))


def test_what_is_done_meanwhile_sees_tensors_that_are_being_copied_and_does_not_count(monkeypatch):
    clock, tensor = [0.0], torch.arange(100.0)
    monkeypatch.setattr(offload.time, "perf_counter", lambda: clock[0])
    moved = Offload(lambda: [tensor])
    copy, seen = moved._copy, []
    monkeypatch.setattr(moved, "_copy", lambda *a, **k: (copy(*a, **k), clock.append(clock.pop() + 1.0)))

    def meanwhile() -> None:
        clock[0] += 10.0
        seen.append((tensor.clone(), moved._pieces[0][:400].clone().view(torch.float32)))

    with moved.away(meanwhile):
        assert tensor.untyped_storage().nbytes() == 0
    (both,) = seen
    assert all(torch.equal(values, torch.arange(100.0)) for values in both) and moved.seconds == 2.0

    def fails() -> None:
        raise ValueError("the push failed")

    with pytest.raises(ValueError, match="the push failed"), moved.away(fails):
        pytest.fail("never here")
    assert torch.equal(tensor, torch.arange(100.0))


def test_views_of_one_storage_are_moved_once_and_stay_views():
    whole = torch.arange(400.0)
    views, expected = [whole[:300].view(30, 10), whole[100:]], whole.clone()
    moved = Offload(lambda: views)
    with moved.away():
        assert whole.untyped_storage().nbytes() == 0
    assert sum(len(piece) for piece in moved._pieces) == 2000, "1,600 bytes take two buffers of 1,000"
    views[0][0, 0] = -1.0
    expected[0] = -1.0
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("broken", [False, True], ids=["sound", "a device that is lost"])
def test_an_error_inside_is_the_one_that_is_raised_and_tensors_are_back(broken, monkeypatch):
    tensor = torch.arange(100.0)
    moved = Offload(lambda: [tensor])
    if broken:
        monkeypatch.setattr(moved, "_return", lambda: torch.empty(-1))
    with pytest.raises(ValueError, match="the rollout failed"), moved.away():
        raise ValueError("the rollout failed")
    assert broken or torch.equal(tensor, torch.arange(100.0))


def test_without_room_in_host_memory_nothing_has_left(monkeypatch):
    tensor = torch.arange(1000.0)
    moved = Offload(lambda: [tensor])

    def empty(*shape, pin_memory=False, **_):
        if moved._pieces:
            raise RuntimeError("CUDA error: out of memory")
        return torch.zeros(*shape, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        with pytest.raises(RuntimeError, match="out of memory"), moved.away():
            pytest.fail("never here")
    assert torch.equal(tensor, torch.arange(1000.0))


FAILURE = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"


def offloaded(module: nn.Module) -> OffloadedAdamW:
    optimizer = build_optimizer(module, OptimConfig(offload="cpu"))
    assert isinstance(optimizer, OffloadedAdamW)
    return optimizer


def no_pinned_memory(*_, **__):
    raise torch.AcceleratorError(FAILURE)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("allocates", "use", "message"),
    [
        (
            "zeros", lambda: offloaded(module := nn.Linear(17, 2**16)).init_state(module.weight),
            "optim.offload=cpu: this process cannot pin 0.02 GiB of host memory for AdamW's moments (CUDA error: out of memory); ",
        ),
        (
            "empty", lambda: Offload(lambda: [torch.zeros(2**22)])._leave(),
            "rollout.offload_policy: this process cannot pin 0.02 GiB of host memory for the policy while vLLM samples (CUDA ",
        ),
        (
            "empty", lambda: HostInputs().run(lambda x: x * x, torch.zeros(2**22, requires_grad=True)),
            "model.activation_checkpointing: this process cannot pin 0.02 GiB of host memory for the input of one more layer (",
        ),
    ],
    ids=["moments", "weights that rest", "inputs of layers"],
)  # fmt: skip
def test_host_memory_that_cannot_be_pinned_is_refused_with_key_size_and_fix(monkeypatch, allocates, use, message):
    monkeypatch.setattr("pgrpo.training.long_samples.is_training", lambda layout: True)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (2**29, 2**29))
    original = getattr(torch, allocates)

    def pinning(*sizes, pin_memory=None, **more):
        return original(*sizes, **more) if pin_memory is None else no_pinned_memory()

    monkeypatch.setattr(torch, allocates, pinning)
    with pytest.raises(RuntimeError) as caught:
        use()
    said = str(caught.value)
    assert said.startswith(message), said
    assert re.search(
        r"; \d+\.\d\d GiB are free, and `ulimit -l` says 0\.50 GiB: give the machine or container more \(", said
    )
    key = message.split(":")[0].split("=")[0]
    assert re.search(rf", or set {key}=(none|never|full)$", said)


@pytest.mark.parametrize("key", ["loss.ref_offload", "loss.teacher_offload"])
def test_so_is_the_memory_of_a_frozen_model(monkeypatch, tiny_model, tmp_path, key):
    config = load_config(
        "quickstart", [f"model.path={tiny_model}", f"loss.teacher={tiny_model}", "loss.kl_coef=0.1", f"{key}=cpu"]
    )
    place = place_reference if "ref" in key else place_teacher
    with start() as world, monkeypatch.context() as patch:
        patch.setattr(fsdp, "place", no_pinned_memory)
        with pytest.raises(RuntimeError, match=rf"^{key}=cpu: this process .* a frozen model .*, or set {key}=none$"):
            place(config, world)


def test_other_errors_than_of_pinning_stay_as_they_are():
    for kind in (torch.OutOfMemoryError, torch.distributed.DistBackendError):
        with pytest.raises(kind, match=r"^as it was$"), pinning(1, "a frozen model", "key", "another"):
            raise kind("as it was")
