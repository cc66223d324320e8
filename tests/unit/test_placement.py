"""Kernel, plan, compilation and checkpointing that a config resolves to on a device."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pgrpo.attention.choose import Ancestry, AttentionChoice
from pgrpo.attention.kernels import flash as kernels
from pgrpo.attention.kernels.flash import choose_kernel
from pgrpo.commands import doctor
from pgrpo.config import Config, ConfigError, ModelConfig
from pgrpo.distributed.world import World
from pgrpo.placement import layers, vllm_memory
from pgrpo.placement.choices import attention_choice, check_device, is_compiled
from pgrpo.placement.layers import layer_plan
from pgrpo.placement.sizes import PLANNED_GPU, SLEEPING_VLLM_GIB, USABLE_SHARE, plan_sizes
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.memory import memory_plan
from pgrpo.types import Recompute

DIMS = ModelDims.from_config(
    json.loads((Path(__file__).parents[2] / "benchmarks" / "qwen3_4b" / "config.json").read_text())
)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config(**model) -> Config:
    return Config(run_dir="runs/x", model=ModelConfig(path="x", **model))


def test_a_cpu_runs_the_builtin_kernel_plainly():
    choice = attention_choice(config(dtype="float32"), DIMS, CPU)
    assert (choice.kernel, choice.way, choice.heads, choice.kv_heads, choice.head_dim) == (
        "builtin",
        "between_depths",
        32,
        8,
        128,
    )
    assert choice.reason == "not flash4: it needs a CUDA GPU"
    assert not is_compiled(config(), CPU)
    assert is_compiled(config(), GPU)
    assert is_compiled(config(compile=True), CPU)
    assert not is_compiled(config(compile=False), GPU)
    assert layer_plan(config(), DIMS, World(0, 1, CPU)) == (["none"] * 36, 1, 36)


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
        ((9, 0), torch.bfloat16, 256, True, "flash4", "the fastest that can run here"),
        ((9, 0), torch.bfloat16, 264, True, None, "head dim 264 is not a multiple of 8 up to 256"),
        ((10, 0), torch.bfloat16, 256, True, "flash4", "the fastest that can run here"),
        (
            (10, 0),
            torch.bfloat16,
            192,
            True,
            "builtin",
            "not flash4: head dim 192 is not a multiple of 8 up to 128, or 256",
        ),
        ((8, 6), torch.bfloat16, 64, True, "builtin", "not flash4: compute capability 8.6"),
        ((7, 5), torch.bfloat16, 64, True, None, "compute capability 7.5 is older than Ampere"),
        ((9, 0), torch.float32, 64, True, None, "it computes in bfloat16 or float16, not float32"),
    ],
)
def test_kernels_of_a_gpu(monkeypatch, capability, dtype, head_dim, installed, chosen, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(kernels, "_flash4", lambda: None)
    if chosen is None:
        with pytest.raises(ValueError, match=reason):
            choose_kernel("auto", GPU, dtype, head_dim)
    else:
        choice = choose_kernel("auto", GPU, dtype, head_dim)
        assert choice.name == chosen
        assert reason in choice.reason


def test_what_else_a_model_asks_of_a_kernel(monkeypatch):
    """Values of another size, and soft-capped scores, which only flash4 computes on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(kernels, "_flash4", lambda: None)
    assert choose_kernel("auto", GPU, torch.bfloat16, 192, 128).name == "flash4"
    assert choose_kernel("auto", GPU, torch.bfloat16, 192, 136).name == "builtin"
    assert choose_kernel("auto", GPU, torch.bfloat16, 128, softcapped=True).name == "flash4"
    with pytest.raises(ValueError, match="not builtin: it cannot soft-cap scores"):
        choose_kernel("auto", GPU, torch.bfloat16, 192, softcapped=True)
    assert choose_kernel("auto", CPU, torch.float32, 192, 128, softcapped=True).name == "builtin"


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine that says it has a Hopper GPU, and ``install(files)``, which puts files of a package flash_attn on the path."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(name="NVIDIA L40 of another kind", total_memory=2**36, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.syspath_prepend(tmp_path)
    kernels._flash4.cache_clear()

    def install(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    yield install
    kernels._flash4.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


NO_CUTLASS = "import cutlass_that_is_not_there"
DAMAGED = {
    "the package": ({"flash_attn/__init__.py": "raise ImportError('undefined symbol: _Z')"}, "ImportError: undefined symbol: _Z"),
    "its parent": (
        {"flash_attn/__init__.py": "raise OSError('libcudart.so.11')", "flash_attn/cute/__init__.py": ""},
        "OSError: libcudart.so.11",
    ),
    "a folder": (
        {"flash_attn/__init__.py": "", "flash_attn/cute/__init__.py": NO_CUTLASS, "flash_attn/cute/interface.py": ""},
        "ModuleNotFoundError: No module named 'cutlass_that_is_not_there'",
    ),
    "the interface": (
        {"flash_attn/__init__.py": "", "flash_attn/cute/__init__.py": "", "flash_attn/cute/interface.py": "def f(:"},
        "SyntaxError: ",
    ),
    "half of it": (
        {"flash_attn/__init__.py": "", "flash_attn/cute/__init__.py": ""},
        "ModuleNotFoundError: No module named 'flash_attn.cute.interface'",
    ),
    "no package": ({"flash_attn.py": ""}, "ModuleNotFoundError: "),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_flash_attn_is_a_reason_for_auto_and_one_line_for_flash4(hopper, damage):
    files, reason = DAMAGED[damage]
    hopper(files)
    choice = choose_kernel("auto", GPU, torch.bfloat16, 128)
    assert choice.name == "builtin"
    assert choice.reason.startswith(f"not flash4: flash-attn-4 is installed but cannot be imported ({reason}")
    assert choice.reason.endswith("): pip install -e '.[flash]' has versions that fit each other")
    with pytest.raises(ConfigError) as error:
        attention_choice(config(attention_kernel="flash4"), DIMS, GPU)
    expected = f"model.attention_kernel=flash4: flash4 cannot run here: flash-attn-4 is installed but cannot be imported ({reason}"
    assert str(error.value).startswith(expected)
    assert len(str(error.value).splitlines()) == 1


def test_doctor_goes_on_when_flash_attn_is_damaged(hopper, capsys):
    hopper(DAMAGED["the package"][0])
    doctor.doctor()
    shown = capsys.readouterr().out
    for head_dim in (64, 128):
        cannot = "cannot run: flash-attn-4 is installed but cannot be imported (ImportError: undefined symbol: _Z)"
        assert f"  head dim {head_dim}: flash4 {cannot}" in shown
        assert f"  head dim {head_dim}: auto takes builtin\n" in shown
    assert "bfloat16 rate unknown: no perf/mfu in the metrics" in shown


def test_auto_checkpointing_on_a_gpu_spares_the_last_layers(monkeypatch):
    """80 GiB, moments in host memory: some layers recompute, the first ones."""
    monkeypatch.setattr(layers, "gpu_memory", lambda device: 80 * 2**30)
    chosen = config()
    chosen.optim.offload = "cpu"
    modes = layer_plan(chosen, DIMS, World(0, 1, GPU)).recompute
    count = modes.count("attention")
    assert 0 < count < 36
    assert modes == ["attention"] * count + ["matmuls"] * (36 - count)
    chosen.model.activation_checkpointing = "full"
    assert layer_plan(chosen, DIMS, World(0, 1, GPU)) == (["full"] * 36, 1, 36)


@pytest.mark.parametrize("mode", ["auto", "matmuls"])
def test_layers_stay_gathered_in_the_memory_that_is_left(monkeypatch, mode):
    """The full fine-tuning of Qwen3-4B on a GPU of 80 GB beside a sleeping vLLM, whose layers keep their products."""
    for module in (layers, vllm_memory):
        monkeypatch.setattr(module, "host_memory", lambda: 128 * 2**30)
    chosen = config(activation_checkpointing=mode)
    chosen.rollout.engine, chosen.rollout.prompts_per_step, chosen.rollout.group_size = "vllm", 32, 8
    chosen.data.max_prompt_tokens, chosen.rollout.max_completion_tokens = 4096, 1024
    chosen.optim.offload, chosen.train.token_budget = "cpu", 12_288
    plan = layer_plan(chosen, DIMS, World(0, 1, GPU))
    assert plan.recompute == ["matmuls"] * 36 and 0 < plan.stay_gathered < 36
    sizes = plan_sizes(chosen, DIMS, World(0, 1, GPU), GPU)
    capacity = USABLE_SHARE * PLANNED_GPU / 2**30 - SLEEPING_VLLM_GIB
    peaks = [
        memory_plan(DIMS, **plan._replace(stay_gathered=plan.stay_gathered + more)._asdict(), **sizes).peak
        for more in (0, 1)
    ]
    assert peaks[0] <= capacity < peaks[1]


@pytest.mark.parametrize("prompts", [1, 2, 64])
def test_a_long_group_that_fits_a_micro_batch_is_not_recomputed_for_kept_prefixes(monkeypatch, prompts):
    """On 80 GB beside vLLM with 128 GiB of host memory; keys and values of 131,072 tokens and their gradients take 36 GiB. A
    group that the budget cuts does need them."""
    for module in (layers, vllm_memory):
        monkeypatch.setattr(module, "host_memory", lambda: 128 * 2**30)
    long = config(max_positions=140_000)
    long.rollout.engine, long.rollout.prompts_per_step, long.rollout.group_size = "vllm", prompts, 8
    long.data.max_prompt_tokens, long.rollout.max_completion_tokens = 131_072, 1024
    long.optim.offload, long.train.token_budget = "cpu", 131_072 + 8192
    plan = layer_plan(long, DIMS, World(0, 1, GPU))
    assert plan == (["full"] * 36, 4, 0)
    sizes = plan_sizes(long, DIMS, World(0, 1, GPU), GPU)
    kept = layers.keepable_tokens(long, DIMS, World(0, 1, GPU))
    assert sizes["kept_tokens"] == (131_072 if prompts > 1 else 0) and kept < 10_000
    sizes["kept_tokens"] = kept
    planned = memory_plan(DIMS, **plan._asdict(), **sizes)
    assert planned.update < USABLE_SHARE * PLANNED_GPU / 2**30 - SLEEPING_VLLM_GIB
    long.train.token_budget = 131_072 + 4096
    assert layer_plan(long, DIMS, World(0, 1, GPU)).recompute == ["offload"] * 36
    # The inputs of 36 layers take 24 GiB. Four ranks, each with a batch of its own, share the host's memory.
    four = World(0, 4, GPU, fsdp_size=1)
    assert "offload" not in layer_plan(long, DIMS, four).recompute
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # four hosts
    assert layer_plan(long, DIMS, four).recompute == ["offload"] * 36


def test_the_plan_counts_no_more_rows_than_a_step_has():
    """Eight prompts of 128 tokens, eight completions of 32 for each, counted by hand; the budget is 16,384."""
    small = config(dtype="float32")
    small.rollout.prompts_per_step, small.rollout.group_size = 8, 8
    small.data.max_prompt_tokens, small.rollout.max_completion_tokens = 128, 32

    def rows(chosen: Config) -> int:
        return plan_sizes(chosen, DIMS, World(0, 1, CPU), CPU)["token_budget"]

    assert rows(small) == 8 * (128 + 8 * 32)
    assert rows(replace(small, model=replace(small.model, attention="repeated"))) == 64 * (128 + 32)
    small.rollout.prompts_per_step = 64
    assert rows(small) == 16_384
    small.rollout.prompts_per_step = 1
    assert rows(replace(small, tools=["calculator.py:multiply"])) == 16_384  # an episode may have several samples


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

    def copied(prompts, completions):
        rows = sum(p + size * n for p, (n, size) in zip(prompts, completions, strict=True))
        copies = sum(p * size for p, (_, size) in zip(prompts, completions, strict=True))
        below = rows - sum(prompts)
        return choice.choose([Ancestry(sum(prompts), copies), Ancestry(below, 0)]).copied

    assert copied([64], [(4096, 4)]) == copied([512], [(2048, 8)]) == {0}
    assert copied([8192], [(256, 8)]) == copied([4096] * 4, [(256, 16)] * 4) == set()


def test_each_depth_is_copied_or_read_where_it_is_by_its_own_cost():
    """A prompt of 8,192 tokens is not copied; turns of 128 tokens below it are. Copying one depth copies every row once."""
    choice = AttentionChoice("flash4", 32, 8, 128, "auto")
    depths = [Ancestry(8192, 8192 * 6), Ancestry(256, 128 * 4), Ancestry(2048, 0)]
    chosen = choice.choose(depths)
    assert chosen.copied == {1}
    mib = 2 * 128 / 2**20
    root = sum(155_000 + 7700 * rows * 32 * mib for rows in (256, 2048))
    assert chosen.ns == pytest.approx(root + 4760 * (8192 + 256 + 2048 + 512) * 16 * mib)
    assert (
        chosen.ns
        < replace(choice, way="between_depths").choose(depths).ns
        < replace(choice, way="copied_keys").choose(depths).ns
    )


FULL: list[Recompute] = ["full"] * 36


def test_the_plan_of_episodes_has_a_prompt_for_each_and_what_is_kept_for_their_next_turns():
    chosen = config()
    chosen.train.steps, chosen.rollout.max_concurrent = 1, 40
    chosen.environment.max_episode_tokens = 100
    chosen.rollout.max_completion_tokens = 30
    chosen.data.max_prompt_tokens = 50
    row = 2 * 36 * 8 * 128 * 2 / 2**30

    def kv_cache():
        return memory_plan(DIMS, recompute=FULL, **plan_sizes(chosen, DIMS, World(0, 1, CPU), CPU)).kv_cache

    assert kv_cache() == pytest.approx(row * (40 * 30 + 5 * 50))
    chosen.tools = ["own.py:f"]
    kept, batch = (
        40 * (50 + 100),
        40 * (50 + 100 + 30),
    )  # a batch has room for a whole turn behind its longest prompts, too
    assert kv_cache() == pytest.approx(row * (kept + batch))
