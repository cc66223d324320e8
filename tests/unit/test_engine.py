"""Which engine a run takes, what is refused before a weight is loaded, and how much memory vLLM is given."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pgrpo.config import Config, ConfigError, DataConfig, ModelConfig, RolloutConfig
from pgrpo.distributed.world import World
from pgrpo.planning import placement
from pgrpo.planning.flops import GIB, ModelDims, parameter_count
from pgrpo.rollout.vllm import engine as vllm
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.training import engine
from pgrpo.types import Request, SamplingParams

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
QWEN3_4B = ModelDims(36, 2560, 32, 8, 128, 9728, 151936, True, 0, True, False)


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
    assert "rollout.engine=auto: rollouts by the policy itself (vLLM is not installed" in caplog.text


def refusal(settings, size=1, device=CPU):
    with pytest.raises(ConfigError) as caught:
        engine.check_engine(settings, QWEN3_4B, World(0, size, device))
    return str(caught.value)


def test_what_is_refused(installed, monkeypatch):
    engine.check_engine(config(engine="vllm", tensor_parallel_size=2), QWEN3_4B, World(0, 4, GPU))
    assert "vLLM 0.26.0 was not tested on a cpu device" in refusal(config(engine="vllm"))
    message = refusal(config(engine="vllm", tensor_parallel_size=3), size=6)
    assert message == "rollout.tensor_parallel_size: 3 does not divide 32 attention heads; it may be 1, 2"
    assert "4 does not divide 2 ranks; it may be 1, 2" in refusal(config(engine="vllm", tensor_parallel_size=4), size=2)
    message = refusal(config(enforce_eager=True))
    assert message.startswith("rollout.enforce_eager: True has no effect on the embedded engine")
    installed.__version__ = "0.27.1"
    message = refusal(config(engine="vllm"))
    assert "vLLM 0.27.1 was not tested on a cpu device, 0.32 was" in message
    assert "rollout.allow_untested_vllm=true" in message
    engine.check_engine(config(engine="vllm", allow_untested_vllm=True), QWEN3_4B, World(0, 1, GPU))
    monkeypatch.setattr(vllm_start, "is_installed", lambda: False)
    assert "vLLM is not installed: pip install 'pgrpo[vllm]'" in refusal(config(engine="vllm"))


def test_memory_share(installed, monkeypatch):
    """What the policy holds between updates is vLLM's loss: 15 GiB of float32 weights here, beside 80; and what it takes itself."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    world = World(0, 1, GPU)
    weights = 4 * parameter_count(QWEN3_4B) / GIB / 80
    share = placement.vllm_memory_share(config(), QWEN3_4B, world)
    usable = placement.USABLE_SHARE - placement.SLEEPING_VLLM_GIB / 80
    assert share == pytest.approx(usable - weights) and 0.65 < share < 0.7
    with_moments = config()
    with_moments.optim.offload = "none"
    assert placement.vllm_memory_share(with_moments, QWEN3_4B, world) == pytest.approx(usable - 3 * weights)
    assert placement.vllm_memory_share(config(gpu_memory_utilization=0.3), QWEN3_4B, world) == 0.3
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * GIB))
    with pytest.raises(
        ConfigError,
        match=r"beside the policy's 15 GiB of 24, and 6 for CUDA, its graphs and libraries, 3 are left for vLLM, which needs 9 ",
    ):
        placement.vllm_memory_share(config(), QWEN3_4B, world)


def test_the_log_says_how_many_completions_fit_vllms_cache(caplog):
    """Groups of 8 with prompts of 4,096 and completions of 1,024 take 12,288 tokens."""
    vllm_start.tell_room(config(group_size=8), 32 * 12_288)
    assert not caplog.text
    vllm_start.tell_room(config(group_size=8), 20 * 12_288 + 4096 + 2 * 1024 + 1000)
    assert "holds 252,904 tokens: 162 completions at their longest, of 256 at once" in caplog.text
    caplog.clear()
    vllm_start.tell_room(config(group_size=8, prompts_per_step=4), 4 * 12_288)
    assert not caplog.text


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA Error: out of memory")])
def test_an_engine_that_sleeps_wakes_before_it_is_shut_down(error):
    """vLLM's allocator reports CUDA errors for memory that is freed asleep. Without room to wake it is shut down all the same."""
    calls = []

    def wake_up():
        calls.append("wake_up")
        if error is not None:
            raise error

    core = SimpleNamespace(shutdown=lambda: calls.append("shutdown"))
    made = vllm.VLLMEngine.__new__(vllm.VLLMEngine)
    made.sleeps, made.seconds = True, 60.0
    made.llm = SimpleNamespace(wake_up=wake_up, llm_engine=SimpleNamespace(engine_core=core))
    made.close()
    assert calls == ["wake_up", "shutdown"]


def test_ranks_that_share_an_engine_exchange_requests_on_the_cpu(monkeypatch):
    """NCCL takes GPU memory for objects, which an awake vLLM does not leave free. Tensors stay on the default backend."""
    asked, gathered = [], []
    settings = config(engine="vllm", tensor_parallel_size=2)

    def all_gather_object(shares, own, group):
        gathered.append(group)
        shares[:] = [own, [Request([8], [1])]] if group == ((2, 3), "gloo") else None

    llm = SimpleNamespace(apply_model=lambda f: [f(SimpleNamespace(compute_logits=None))])
    monkeypatch.setattr(vllm_start, "prepare", lambda *_: None)
    monkeypatch.setattr(vllm_start, "start", lambda *_, **__: llm)
    package = SimpleNamespace(
        SamplingParams=dict, sampling_params=SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY=0))
    )
    monkeypatch.setattr(vllm_start, "package", lambda: package)
    monkeypatch.setattr(vllm.dist, "new_group", lambda ranks, backend=None: (tuple(ranks), backend))
    monkeypatch.setattr(vllm.dist, "all_gather_object", all_gather_object)
    one: Any = vllm.VLLMEngine(settings, World(2, 4, CPU), None, [0], lambda: iter(()), set(), memory_share=0.5)  # pyright: ignore[reportArgumentType]
    one.is_awake = True
    one.requests = SimpleNamespace(run_all=lambda prompts, *_: asked.append(prompts))
    one._sample([Request([7], [0])], SamplingParams(max_completion_tokens=4), lambda *_: None)
    assert gathered == [((2, 3), "gloo")] and asked == [[[7], [8]]]
    assert one.tp_group == ((2, 3), None)
