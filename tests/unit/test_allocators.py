"""What PyTorch's allocators are told, and when."""

import os

import pytest
import torch
from making import asked_of_vllm

from pgrpo.config import Config, ModelConfig, RolloutConfig
from pgrpo.distributed import world
from pgrpo.process.allocators import PINNED, fixed_segments, set_up_allocators
from pgrpo.rollout.vllm import start

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.fixture
def told(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    return found


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", None, PINNED),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64", f"max_split_size_mb:64,{PINNED}"),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:64", f"max_split_size_mb:64,{PINNED}"),
        ("PYTORCH_CUDA_ALLOC_CONF", "pinned_num_register_threads:2", "pinned_num_register_threads:2"),
    ],
)
def test_segments_grow_but_for_vllms_start_and_other_settings_stay(told, name, before, after):
    if before:
        os.environ[name] = before
    set_up_allocators()
    assert [os.environ.get(other) for other in NAMES] == [after if other == name else None for other in NAMES]
    with pytest.raises(ValueError, match="it failed"), fixed_segments():
        raise ValueError("it failed")
    assert told == [f"{after},expandable_segments:{on}" for on in (True, False, True)]


def test_a_run_sets_them_up_before_it_uses_a_gpu(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    with world.start() as found:
        pass
    assert told == [f"{PINNED},expandable_segments:True", found.device]


def test_an_engine_is_built_of_fixed_segments(told, monkeypatch):
    during = []
    monkeypatch.setattr(start, "rng_state", lambda: None)  # there is no GPU
    monkeypatch.setattr(start, "_graph_sizes", lambda *_: during.extend(told) or {})  # as vLLM is asked
    asked_of_vllm(monkeypatch, Config(model=ModelConfig(path="m"), rollout=RolloutConfig(engine="vllm")))
    assert during == ["expandable_segments:False"] and told == [*during, "expandable_segments:True"]


@pytest.mark.parametrize("given", ["expandable_segments:False", "expandable_segments:True", "backend:cudaMallocAsync"])
def test_what_a_user_says_of_segments_stays(told, given):
    os.environ["PYTORCH_ALLOC_CONF"] = given
    set_up_allocators()
    with fixed_segments():
        pass
    assert not told and os.environ["PYTORCH_ALLOC_CONF"].startswith(f"{given},pinned_")


def test_pytorch_takes_these_settings():
    """Its parser refuses keys and values that it does not know."""
    for on in (True, False):
        torch._C._accelerator_setAllocatorSettings(f"max_split_size_mb:64,expandable_segments:{on}")  # pyright: ignore
    torch._C._accelerator_setAllocatorSettings("")  # pyright: ignore
    with pytest.raises((ValueError, RuntimeError)):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:perhaps")  # pyright: ignore


def test_without_a_gpu_nothing_is_told(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    set_up_allocators()
    assert not told
