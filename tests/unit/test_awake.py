"""Where vLLM keeps its memory during updates (``rollout.sleep``), and what an engine that does not sleep does otherwise."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from making import asked_of_vllm

from pgrpo.commands import evaluate, generate, plan
from pgrpo.config import Config, ConfigError, ModelConfig, RolloutConfig, load_config
from pgrpo.distributed.world import World
from pgrpo.placement import awake, layers, vllm_memory
from pgrpo.placement.awake import engine_memory, vllm_text
from pgrpo.placement.layers import keepable_tokens, layer_plan, update_gib
from pgrpo.placement.sizes import SLEEPING_VLLM_GIB, USABLE_SHARE, plan_sizes
from pgrpo.planning.flops import GIB, ModelDims
from pgrpo.planning.memory import memory_plan
from pgrpo.rollout.vllm import engine, loading
from pgrpo.rollout.vllm.delivery import DeliveryError
from pgrpo.rollout.vllm.offload import Offload
from pgrpo.rollout.vllm.requests import EngineError
from pgrpo.types import Recompute

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ONE = World(0, 1, GPU)


def dims(shape: str) -> ModelDims:
    return ModelDims.from_config(json.loads((BENCHMARKS / shape / "config.json").read_text()))


LARGE, SMALL = dims("qwen3_4b"), dims("qwen3_1.7b_vocab_49152")


def config(*overrides: str, completion=512, prompts=4, budget=8192) -> Config:
    """The shape of a complete step: prompts of 4,096 tokens with 8 completions each."""
    return load_config("qwen3_4b", [
        "rollout.engine=vllm", f"rollout.prompts_per_step={prompts}", f"rollout.max_completion_tokens={completion}",
        "data.max_prompt_tokens=4096", f"train.token_budget={budget}", "eval.every=0", "optim.offload=none", *overrides,
    ])  # fmt: skip


def bare_update(settings: Config) -> float:
    """GiB of an update that recomputes nothing, and in which no layer stays gathered."""
    nothing: list[Recompute] = ["none"] * SMALL.layers
    return memory_plan(SMALL, recompute=nothing, **plan_sizes(settings, SMALL, ONE, GPU)).peak


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """A GPU of 80 GiB beside 128 of host memory; returns what sets its size."""

    def size(gib: float) -> None:
        for module in (awake, layers, vllm_memory):
            monkeypatch.setattr(module, "gpu_memory", lambda _: gib * GIB)
        for module in (layers, vllm_memory):
            monkeypatch.setattr(module, "host_memory", lambda: 128 * GIB)

    size(80)
    return size


def test_vllm_stays_awake_where_update_cache_and_graphs_fit_and_sleeps_one_gib_below(card):
    """Of a fixed plan: the update's peak by ``memory_plan``, vLLM's memory, graphs, and what is never planned. Layers stay gathered
    in the memory that is left then: beside a vLLM that sleeps more of them."""
    settings = config("model.activation_checkpointing=none")
    update = bare_update(settings)
    keys = 28 * 8 * 2 * 128 * 2 * (4 * 4096 + 32 * (512 + 16)) / GIB
    logits = settings.rollout.max_concurrent * 49_152 * vllm_memory.SAMPLER_BYTES / GIB
    needed = 2 * SMALL.parameters / GIB + keys + logits
    least, most = 1.25 * needed + 2, 1.25 * needed + 8
    limit = (update + SLEEPING_VLLM_GIB + least) / USABLE_SHARE
    for total, sleeps in ((limit + 0.1, False), (limit - 0.1, True)):
        card(total)
        found = engine_memory(settings, SMALL, ONE)
        assert found.sleeps is sleeps
        if sleeps:
            assert found.memory == vllm_memory.vllm_memory(settings, SMALL, ONE)
            # Layers stay gathered because of that, and not the other way round.
            assert f"its {least:.1f} GiB and the update's {update:.1f} do not fit side by side" in found.why
            assert layer_plan(settings, SMALL, ONE).stay_gathered == SMALL.layers
            assert update_gib(settings, SMALL, ONE) > update + 1
        else:
            assert (
                found.memory.share * total == pytest.approx(least + 0.1 * USABLE_SHARE) and not found.memory.offloaded
            )
            assert layer_plan(settings, SMALL, ONE).stay_gathered == 0
            for told in ("sleep", "offload_policy"):  # it sleeps whatever the room
                sleeping = config("model.activation_checkpointing=none", f"rollout.{told}=always")
                assert layer_plan(sleeping, SMALL, ONE).stay_gathered == SMALL.layers
    card(limit + 1)  # as many as fit into that, of 50,331,648 elements
    layer = 2 * 50_331_648 / GIB
    count = int(USABLE_SHARE / layer)
    assert SMALL.layer_matrix == 50_331_648 and layer_plan(settings, SMALL, ONE).stay_gathered == count
    assert update_gib(settings, SMALL, ONE) == pytest.approx(update + count * layer)
    assert not engine_memory(settings, SMALL, ONE).sleeps
    card(limit + 50)
    assert engine_memory(settings, SMALL, ONE).memory.share * (limit + 50) == pytest.approx(most)
    assert layer_plan(settings, SMALL, ONE).stay_gathered == SMALL.layers


@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_staying_awake_costs_an_update_nothing(card, shape):
    """Whatever the GPU: the same layers are recomputed and as many tokens kept as with a vLLM that sleeps, and all fits."""
    seen = set()
    asleep, settings = (config(f"rollout.sleep={mode}", "optim.offload=cpu") for mode in ("always", "auto"))
    for total in (40, 60, 80, 180):
        card(total)
        plans = [(layer_plan(c, shape, ONE)[:2], keepable_tokens(c, shape, ONE)) for c in (asleep, settings)]
        assert plans[0] == plans[1]
        found = engine_memory(settings, shape, ONE)
        seen.add(found.sleeps)
        if not found.sleeps:
            taken = update_gib(settings, shape, ONE) + found.memory.share * total + SLEEPING_VLLM_GIB
            assert taken <= USABLE_SHARE * total + 1e-9
    assert seen == {True, False}


def test_the_full_fine_tune_of_a_large_model_sleeps_as_without_this_choice():
    settings = config("optim.offload=cpu", completion=1024, prompts=32, budget=12_288)
    found = engine_memory(settings, LARGE, ONE)
    assert found.sleeps and found.memory == vllm_memory.vllm_memory(settings, LARGE, ONE)
    assert found.memory.offloaded == ("weights",) and found.why == "it samples in memory of the policy's"


def test_a_dry_run_plans_the_rollout_with_what_stays_of_the_weights(monkeypatch):
    monkeypatch.setattr(plan, "gpu_memory", lambda _: 80 * GIB)
    keys = f"model.path={BENCHMARKS / 'qwen3_4b'}", "optim.offload=cpu"
    settings = config(*keys, completion=1024, prompts=32, budget=12_288)
    memory = engine_memory(settings, LARGE, ONE).memory
    assert 0 < memory.staying_gib < memory.offloaded_gib
    gathered = 2 * (LARGE.vocab * LARGE.hidden + 2 * LARGE.layer_matrix) / GIB
    assert f" a rank (estimate): rollout {memory.staying_gib + gathered:.1f}, update" in plan.plan_text(settings)


def test_where_it_sleeps_whatever_the_room(card):
    card(400)
    assert not engine_memory(config(), SMALL, ONE).sleeps
    asked = config("rollout.sleep=always")
    assert engine_memory(asked, SMALL, ONE) == (
        vllm_memory.vllm_memory(asked, SMALL, ONE),
        True,
        "rollout.sleep=always",
    )
    assert engine_memory(config("rollout.offload_policy=always"), SMALL, ONE).sleeps
    assert "there is no bound" in engine_memory(config(), replace(SMALL, state_elements=1), ONE).why
    with_tools = replace(config(), tools=["tools.py:look"])  # pyright: ignore[reportArgumentType]
    assert "there is no bound" in engine_memory(with_tools, SMALL, ONE).why
    with_tools.rollout.gpu_memory_utilization = 0.25  # is a bound
    assert engine_memory(with_tools, SMALL, ONE)[:2] == ((pytest.approx(0.25), (), 0.0, 0.0), False)


def test_a_share_that_was_asked_for_is_neither_raised_nor_lowered(card):
    update = bare_update(config())
    fits = (USABLE_SHARE * 80 - SLEEPING_VLLM_GIB - update) / 80
    for share, sleeps in ((fits - 0.01, False), (fits + 0.01, True)):
        found = engine_memory(config(f"rollout.gpu_memory_utilization={share}"), SMALL, ONE)
        assert found.sleeps is sleeps and found.memory.share == pytest.approx(share)


def test_never_is_refused_with_the_sizes_where_it_does_not_fit(card):
    never = config("rollout.sleep=never")
    assert engine_memory(never, SMALL, ONE) == engine_memory(config(), SMALL, ONE)
    update, group = bare_update(never), vllm_memory.vllm_gib(never, SMALL, 8)
    limit = (update + SLEEPING_VLLM_GIB + group) / USABLE_SHARE
    fixed = config("rollout.sleep=never", "model.activation_checkpointing=none")
    card(limit + 0.1)  # a group at a time
    assert engine_memory(fixed, SMALL, ONE).memory.share == pytest.approx((group + 0.1 * USABLE_SHARE) / (limit + 0.1))
    card(limit - 0.1)
    with pytest.raises(ConfigError) as caught:
        engine_memory(fixed, SMALL, ONE)
    assert str(caught.value) == (
        f"rollout.sleep: never: of {limit - 0.1:.0f} GiB the update takes {update:.1f}, and CUDA, graphs and libraries "
        f"{(limit - 0.1) * (1 - USABLE_SHARE) + 4:.1f}: {group - 0.1 * USABLE_SHARE:.1f} are left for vLLM, which needs "
        f"{group:.1f} (its weights and one group): leave it out, or lower train.token_budget below 8192, or set "
        "model.activation_checkpointing=attention or optim.offload=cpu"
    )
    card(20)
    with pytest.raises(ConfigError, match=rf"or lower train\.token_budget below {4096 + 8 * 256}, or set "):
        engine_memory(config("rollout.sleep=never", completion=256, prompts=1), SMALL, ONE)
    card(80)
    with pytest.raises(ConfigError, match=r"needs 40\.\d \(rollout\.gpu_memory_utilization\)"):
        engine_memory(config("rollout.sleep=never", "rollout.gpu_memory_utilization=0.5"), SMALL, ONE)
    with pytest.raises(ConfigError, match=r"^rollout\.sleep: never: with rollout\.offload_policy=always"):
        engine_memory(config("rollout.sleep=never", "rollout.offload_policy=always"), SMALL, ONE)


@pytest.mark.parametrize("command", [evaluate.evaluate, generate.generate])
def test_an_evaluation_is_checked_against_the_policy_and_vllm_alone(card, monkeypatch, tmp_path, command):
    """Nothing of an update, nor moments; a run of that config would be refused, with more than twice that memory too."""
    asked: list[Config] = []
    monkeypatch.setattr(evaluate, "build", lambda config, *_: asked.append(config) or 1 / 0)
    (tmp_path / "rows.txt").write_text("one\n")
    own = config("rollout.sleep=never", f"run_dir={tmp_path}", "data.eval_split=test")
    with pytest.raises(ZeroDivisionError):
        command(own, prompts=tmp_path / "rows.txt") if command is generate.generate else command(own)
    group, policy = vllm_memory.vllm_gib(asked[0], LARGE, 8), 4 * LARGE.parameters / GIB
    gathered = 2 * (LARGE.vocab * LARGE.hidden + 2 * LARGE.layer_matrix) / GIB
    limit = (policy + gathered + SLEEPING_VLLM_GIB + group) / USABLE_SHARE
    card(limit + 0.1)
    found = engine_memory(asked[0], LARGE, ONE)
    assert not found.sleeps and found.memory.share == pytest.approx((group + 0.1 * USABLE_SHARE) / (limit + 0.1))
    card(limit - 0.1)
    with pytest.raises(ConfigError) as caught:
        engine_memory(asked[0], LARGE, ONE)
    assert f"of {limit - 0.1:.0f} GiB the policy takes {policy + gathered:.1f}, and" in str(caught.value)
    assert str(caught.value).endswith("(its weights and one group): leave it out")
    card(2 * limit)
    with pytest.raises(ConfigError, match="the update takes"):
        engine_memory(own, LARGE, ONE)


def test_without_updates_no_moments_leave_the_gpu_nor_does_setting_their_home_help(card):
    evaluates = config("rollout.offload_policy=always")
    evaluates.train.steps = 0
    found = vllm_memory.vllm_memory(evaluates, LARGE, ONE)
    assert found.offloaded == ("weights",) and found.offloaded_gib == pytest.approx(4 * LARGE.parameters / GIB)
    card(13)
    with pytest.raises(ConfigError, match=r"4096 tokens: use more GPUs \(rollout\.tensor_parallel_size\), or lower"):
        vllm_memory.vllm_memory(evaluates, LARGE, ONE)


def test_a_cpu_has_no_sleep():
    world = World(0, 1, CPU)
    assert engine_memory(config("rollout.sleep=never"), SMALL, world) == engine_memory(config(), SMALL, world)
    assert not engine_memory(config(), SMALL, world).sleeps and "during updates" not in vllm_text(
        config(), SMALL, world
    )
    with pytest.raises(ConfigError, match=r"rollout\.sleep: always: vLLM cannot sleep on a CPU"):
        engine_memory(config("rollout.sleep=always"), SMALL, world)


def test_the_log_says_whether_vllm_sleeps_and_why():
    update = update_gib(config(), SMALL, ONE)
    assert vllm_text(config(), SMALL, ONE).endswith(
        f"of it; awake during updates (the update's {update:.1f} GiB fit beside it)"
    )
    assert vllm_text(config("rollout.sleep=always"), SMALL, ONE).endswith(
        "; asleep during updates (rollout.sleep=always)"
    )


@pytest.mark.parametrize("sleeps", [True, False])
def test_an_engine_that_does_not_sleep_is_started_without_sleep_mode(sleeps, monkeypatch):
    settings = Config(model=ModelConfig(path="m"), rollout=RolloutConfig(engine="vllm"))
    asked = asked_of_vllm(monkeypatch, settings, sleeps=sleeps)
    assert asked["enable_sleep_mode"] is sleeps


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_rollout_wakes_and_sleeps_only_an_engine_that_sleeps_and_pushes_either_way(sleeps, monkeypatch):
    calls = []
    llm = SimpleNamespace(
        wake_up=lambda tags: calls.append(f"wake {tags[0]}"), sleep=lambda level: calls.append(f"sleep {level}")
    )
    monkeypatch.setattr(engine.torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    one: Any = engine.VLLMEngine.__new__(engine.VLLMEngine)
    one.world, one.sleeps, one.is_awake, one.seconds, one.on_gpu = World(0, 1, CPU), sleeps, False, 60.0, False
    weight = torch.zeros(2**18)
    one.llm, one.offload, one.metrics, one.asleep = llm, Offload(lambda: [weight]), {}, set(engine.TAGS)
    one.requests, one.sharers = SimpleNamespace(preemptions=0), engine.Sharers(one.world, 1)
    one.push = lambda: calls.append(
        f"push {weight.untyped_storage().nbytes()} beside {len(one.offload._pieces)} copies"
    )
    with one.awake(3):
        assert one.is_awake and not weight.untyped_storage().nbytes()
        calls.append("sample")
    around = (
        (["empty_cache", "wake weights"], ["empty_cache", "wake kv_cache"], ["sleep 2"]) if sleeps else ([], [], [])
    )
    assert calls == [*around[0], f"push {2**20} beside 1 copies", *around[1], "sample", *around[2]]
    assert not one.is_awake and {"time/wake", "time/weight_sync", "time/sleep"} <= one.metrics.keys()


@pytest.mark.parametrize("is_reset", [True, False])
def test_a_push_drops_keys_and_values_of_the_weights_before_or_fails(is_reset):
    model: Any = torch.nn.Linear(2, 2, bias=False)
    calls = []

    def reload(name, kwargs):
        for weight, tensor in kwargs["weights_iterator"]:
            getattr(model, weight).data.copy_(tensor)
        model.load_weights([])

    model.load_weights = lambda weights: {"weight"}
    llm = SimpleNamespace(collective_rpc=reload, reset_prefix_cache=lambda: calls.append("reset") or is_reset)

    def push():
        loading.load(
            llm, model, iter([("weight", torch.ones(2, 2))]), {"weight"}, lambda _, f: f(),
            is_packed=True, ranks=1, rank=0, sum_over_ranks=lambda x: x,
        )  # fmt: skip

    if is_reset:
        push()
    else:
        with pytest.raises(EngineError, match="keys and values of the weights before"):
            push()
    assert calls == ["reset"]


class Layer(torch.nn.Module):
    """A layer of vLLM's with this quantization method."""

    def __init__(self, method: str | None) -> None:
        super().__init__()
        self.quant_method = method and type(method, (), {})()


class Attention(torch.nn.Module):
    def process_weights_after_loading(self, dtype):
        self.dtype = dtype


def test_parameters_are_written_in_place_only_where_nothing_processes_them_after_loading():
    plain = [Layer("UnquantizedLinearMethod"), Layer("UnquantizedEmbeddingMethod"), Layer(None), Attention()]
    assert loading.loads_in_place(torch.nn.Sequential(*plain))
    latent = type("MLAAttention", (Attention,), {})()
    for other in (Layer("UnquantizedFusedMoEMethod"), Layer("Fp8LinearMethod"), latent):
        assert not loading.loads_in_place(torch.nn.Sequential(*plain, other))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_push_loads_in_place_on_a_gpu_and_lets_attention_process(on_gpu):
    model: Any = torch.nn.Linear(2, 2, bias=False)
    model.attention, reloads = Attention(), []

    def write(weights):
        for _, tensor in weights:
            model.weight.copy_(tensor)
        return {"weight"}

    model.load_weights = write
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(dtype="bf16"))),
        collective_rpc=lambda what, kwargs: reloads.append(what) or torch.no_grad()(write)(kwargs["weights_iterator"]),
        reset_prefix_cache=lambda: True,
    )
    given = torch.full((2, 2), 3.0)
    try:
        loading.load(
            llm, model, iter([("weight", given)]), {"weight"}, lambda _, f: f(),
            is_packed=not on_gpu, ranks=1, rank=0, sum_over_ranks=lambda x: x,
        )  # fmt: skip
        pushed = True
    except DeliveryError:  # the reload of this test writes past ``load_weights``, which notes the names
        pushed = False
    assert torch.equal(model.weight, given) and reloads == ([] if on_gpu else ["reload_weights"])
    assert pushed is on_gpu and getattr(model.attention, "dtype", None) == ("bf16" if on_gpu else None)
