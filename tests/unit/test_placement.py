"""Kernel, plan, compilation and checkpointing that a config resolves to on a device."""

from types import SimpleNamespace

import pytest
import torch

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.kernels import flash as kernels
from pgrpo.attention.kernels.flash import choose_kernel
from pgrpo.config import Config, ConfigError, ModelConfig
from pgrpo.distributed.world import World
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.placement import attention_choice, check_device, is_compiled, kept_by_layer

DIMS = ModelDims(36, 2560, 32, 8, 128, 9728, 151936, tied=True, head_norms=True)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config(**model) -> Config:
    return Config(run_dir="runs/x", model=ModelConfig(path="x", **model))


def test_a_cpu_runs_the_builtin_kernel_plainly():
    choice = attention_choice(config(dtype="float32"), DIMS, CPU)
    assert (choice.kernel, choice.plan, choice.heads, choice.kv_heads, choice.head_dim) == (
        "builtin",
        "two_calls",
        32,
        8,
        128,
    )
    assert choice.reason == "not flash4: it needs a CUDA GPU"
    assert not is_compiled(config(), CPU)
    assert is_compiled(config(), GPU)
    assert is_compiled(config(compile=True), CPU)
    assert not is_compiled(config(compile=False), GPU)
    assert kept_by_layer(config(), DIMS, World(0, 1, CPU)) == ["none"] * 36


def test_a_named_kernel_that_cannot_run_is_an_error_that_says_why():
    with pytest.raises(
        ConfigError, match=r"model.attention_kernel=flash4: flash4 cannot run here: it needs a CUDA GPU"
    ):
        attention_choice(config(attention_kernel="flash4"), DIMS, CPU)
    assert choose_kernel("builtin", CPU, torch.float64, 40).reason == "asked for"


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "installed", "chosen", "reason"),
    [
        ((9, 0), torch.bfloat16, 128, True, "flash4", "the fastest that can run here"),
        ((9, 0), torch.bfloat16, 128, False, "builtin", "not flash4: the package flash-attn-4 is not installed"),
        ((9, 0), torch.bfloat16, 256, True, "builtin", "not flash4: head dim 256"),
        ((8, 6), torch.bfloat16, 64, True, "builtin", "not flash4: compute capability 8.6"),
        ((7, 5), torch.bfloat16, 64, True, None, "compute capability 7.5 is older than Ampere"),
        ((9, 0), torch.float32, 64, True, None, "it computes in bfloat16 or float16, not float32"),
    ],
)
def test_kernels_of_a_gpu(monkeypatch, capability, dtype, head_dim, installed, chosen, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    if chosen is None:
        with pytest.raises(ValueError, match=reason):
            choose_kernel("auto", GPU, dtype, head_dim)
    else:
        choice = choose_kernel("auto", GPU, dtype, head_dim)
        assert choice.name == chosen
        assert reason in choice.reason


def test_a_compiler_that_does_not_fit_is_told_of(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'cutlass.cute'")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(
        RuntimeError, match=r"cannot be imported \(ModuleNotFoundError: No module named 'cutlass.cute'\): pip"
    ):
        kernels._flash4()
    assert "cannot be imported" in str(kernels.import_error("flash4")) and kernels.import_error("builtin") is None


def test_auto_checkpointing_on_a_gpu_spares_the_last_layers(monkeypatch):
    """80 GiB, moments in host memory: some layers compute again, the first ones."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    chosen = config()
    chosen.optim.offload = "cpu"
    kept = kept_by_layer(chosen, DIMS, World(0, 1, GPU))
    again = kept.count("attention")
    assert 0 < again < 36
    assert kept == ["attention"] * again + ["none"] * (36 - again)
    chosen.model.activation_checkpointing = "full"
    assert kept_by_layer(chosen, DIMS, World(0, 1, GPU)) == ["full"] * 36


def test_what_a_device_cannot_do_is_refused():
    with pytest.raises(ConfigError, match=r"model\.dtype=float32"):
        check_device(config(dtype="float32"), GPU)
    offloaded = config()
    offloaded.optim.offload = "cpu"
    with pytest.raises(
        ConfigError, match=r"optim.offload=cpu: there is no GPU to offload from: set optim.offload=none"
    ):
        check_device(offloaded, CPU)
    check_device(offloaded, GPU)
    offloaded = config()
    offloaded.loss.ref_offload = "cpu"
    with pytest.raises(ConfigError, match=r"loss.ref_offload=cpu: there is no GPU .*: set loss.ref_offload=none"):
        check_device(offloaded, CPU)
    check_device(offloaded, GPU)


def test_the_plan_follows_the_lengths():
    """Short prompts and long completions are copied; long prompts are not."""
    choice = AttentionChoice("flash4", 32, 8, 128, "auto")
    assert choice.choose([64], [[4096] * 4]) == "concat"
    assert choice.choose([512], [[2048] * 8]) == "concat"
    assert choice.choose([8192], [[256] * 8]) == "two_calls"
    assert choice.choose([4096] * 4, [[256] * 16] * 4) == "two_calls"
