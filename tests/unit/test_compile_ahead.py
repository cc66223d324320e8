"""A second process compiles what the first update needs; whatever goes wrong there, the run goes on."""

import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pgrpo import early
from pgrpo.admission.compare import tokens_as_groups
from pgrpo.attention.choose import AttentionChoice
from pgrpo.config import load_config
from pgrpo.distributed.world import World
from pgrpo.grpo import backward
from pgrpo.model import recompute
from pgrpo.model.policy import load_hf_config
from pgrpo.placement.layers import free_beside_policy
from pgrpo.placement.sizes import USABLE_SHARE, gpu_memory, plan_sizes
from pgrpo.planning.dims import ModelDims
from pgrpo.planning.flops import GIB
from pgrpo.planning.memory import memory_plan
from pgrpo.planning.recompute import LayerPlan
from pgrpo.process import second
from pgrpo.training import compile_ahead
from pgrpo.training.build import Learner, initial_model
from pgrpo.training.compile_ahead import CompileAhead, compile_update, flat_batch
from pgrpo.training.frozen import frozen_scores
from pgrpo.training.optim import build_optimizer
from pgrpo.training.place import place_policy
from pgrpo.training.update import count, micro_batches

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture
def make(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    keys = [
        f"model.path={tiny_model}",
        f"cache_dir={tmp_path / 'caches'}",
        "model.compile=true",
        "train.token_budget=128",
    ]
    return lambda *more: load_config("quickstart.yaml", [*keys, *more])


@pytest.mark.parametrize(
    ("keys", "count_of_graphs", "backend"),
    [
        (["train.updates_per_step=2", "loss.entropy_coef=0.01"], 2, "aot_eager"),  # with a gradient and without
        # with a gradient of the first layer's input and without, and without any gradient and adapters
        (["model.lora_rank=2", "model.lora_targets=[q_proj]", "loss.kl_coef=0.1"], 3, "eager"),
    ],
)
def test_the_update_of_a_run_compiles_nothing_that_was_not_compiled_ahead(
    make, monkeypatch, keys, count_of_graphs, backend
):
    """With old log-probs, whose forward has no gradient, an entropy term, a reference that is the policy, and other sizes."""
    torch._dynamo.reset()
    recompute.compile_dynamic.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    config = make(*keys)

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    begun = graphs()
    compile_update(config, WORLD)
    ahead = graphs()
    assert ahead == begun + count_of_graphs
    policy = place_policy(config, WORLD)
    dims = ModelDims.from_config(policy.model.config)
    reference = initial_model(policy, config, WORLD) if config.loss.kl_coef else None
    learner = Learner(config, WORLD, policy, reference, build_optimizer(policy, config.optim), dims)
    deep = tokens_as_groups([[5, 6], [5]], [[[5] * n + [7] * 16 for n in range(6)], [[5], [5, 6, 6]]])
    many = tokens_as_groups([[5 + n % 4, 5 + n // 4] for n in range(16)], [[[5], [6 + n % 4]] for n in range(16)])
    flat = (
        tokens_as_groups([[5] * a, [6] * 4], [[[7] * b, [8] * c], [[9, 9], [10]]]) for a, b, c in ((3, 4, 5), (9, 2, 7))
    )
    for groups in (*flat, deep, many):
        for batch in micro_batches(learner, groups):
            if config.train.updates_per_step > 1:
                with torch.no_grad():
                    policy(batch)
            with frozen_scores(learner, batch):
                backward(learner, batch, count(groups))
    assert graphs() == ahead


def test_only_the_weights_are_made_on_the_device(make, monkeypatch):
    """A policy draws probes with generators of the CPU, which a default device of another kind refuses."""

    def place(config, world, load, plan):
        assert torch.empty(1).device.type == "cpu"
        assert next(load(config.model, torch.float32).parameters()).device.type == "meta"
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_ahead, "place_policy", place)
    monkeypatch.setattr(compile_ahead, "layer_plan", lambda *_: LayerPlan(["full"], 1))
    monkeypatch.setattr(compile_ahead, "attention_choice", lambda *_: AttentionChoice())
    with pytest.raises(KeyboardInterrupt):
        compile_update(make(), World(0, 1, torch.device("meta")))


def test_its_batch_is_as_long_as_a_micro_batch_may_be(make):
    config = make("data.max_prompt_tokens=40", "rollout.max_completion_tokens=20", "rollout.group_size=8")
    (first, *_) = samples = flat_batch(config, 1, 1, 1).samples(50)
    assert (len(first.prompt_ids), len(first.token_ids), len(samples)) == (40, 20, 4)  # 40 + 4 * 20 of 128
    assert len({tuple(sample.token_ids) for sample in samples}) == 4


def begun(config, monkeypatch, code):
    monkeypatch.setattr(compile_ahead, "ahead_codes", lambda _: (code, "pass"))
    ahead = CompileAhead(config, WORLD)
    ahead.begin(load_hf_config(config.model))
    return ahead


def test_it_is_done_once(make, monkeypatch, caplog):
    with begun(make(), monkeypatch, "import sys; assert len(sys.stdin.buffer.read()) > 1000") as ahead:
        ahead.wait()
    assert not caplog.records
    for config, again in ((make(), False), (make("optim.lr=1e-6"), False), (make("loss.kl_coef=0.1"), True)):
        with begun(config, monkeypatch, "pass") as ahead:
            assert ahead.update.is_begun == again
    monkeypatch.setattr(compile_ahead, "LOOKED_UP_SEGMENTS", 2)  # kernels of attention that the first one did not call
    with begun(make(), monkeypatch, "pass") as ahead:
        assert ahead.update.is_begun


@pytest.mark.slow
def test_the_process_itself_does_what_the_run_needs(make, caplog):
    with CompileAhead(config := make(), WORLD) as ahead:
        ahead.begin(load_hf_config(config.model))
        ahead.wait()
    assert not caplog.records
    with CompileAhead(config, WORLD) as ahead:
        ahead.begin(load_hf_config(config.model))
        assert not ahead.update.is_begun


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"])
def test_it_is_done_again_for_other_folders_of_code(make, monkeypatch, tmp_path, name):
    def is_begun():
        with begun(make(), monkeypatch, "pass") as ahead:
            ahead.wait()
            return ahead.update.is_begun

    assert [is_begun(), is_begun()] == [True, False]
    monkeypatch.setenv(name, str(tmp_path / "other"))
    assert [is_begun(), is_begun()] == [True, False]


@pytest.mark.parametrize(
    "name", ["place.py", "long_samples.py", "compile_ahead.py", "fsdp.py", "caches.py", "policy.py"]
)
def test_it_is_done_again_for_other_code_of_this_package(make, monkeypatch, name):
    config = make()
    hf_config, read = load_hf_config(config.model), Path.read_bytes
    before = compile_ahead.done_file(config, hf_config, WORLD)
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == name else b""))
    assert compile_ahead.done_file(config, hf_config, WORLD) != before


def test_the_plan_of_the_layers_is_of_the_key_and_not_only_the_config(make, monkeypatch):
    """What ``auto`` means depends on the GPU's memory and on keys outside of the key's sections."""
    config = make()
    hf_config = load_hf_config(config.model)

    def key(plan):
        monkeypatch.setattr(compile_ahead, "layer_plan", lambda *_: plan)
        return compile_ahead.done_file(config, hf_config, WORLD)

    full = key(LayerPlan(["full", "none"], 1))
    assert key(LayerPlan(["none", "full"], 1)) == full
    assert len({full, key(LayerPlan(["full", "full"], 1)), key(LayerPlan(["full", "none"], 2))}) == 3


def refuse(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (Path, "exists", refuse),
        (tempfile, "tempdir", "/no/such/folder"),
        (sys, "executable", "/no/such/python"),
        (compile_ahead, "begun_by", lambda: None),  # pickle cannot find it
    ],
)
def test_what_prevents_its_begin_is_said_once(make, monkeypatch, caplog, where, name, value):
    config = make()
    if where is compile_ahead:
        config.rewards.functions = value
    hf_config = load_hf_config(config.model)
    with monkeypatch.context() as patch, CompileAhead(config, WORLD) as ahead:
        patch.setattr(where, name, value, raising=False)
        ahead.begin(hf_config)
        ahead.wait()
    (said,) = caplog.messages
    assert said.startswith("compiling ahead did not begin (") and said.endswith(compile_ahead.INSTEAD)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends it with the run")
@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.parametrize("when", ["at once", "before its imports are done"])
def test_it_ends_with_a_run_that_is_killed(make, monkeypatch, tmp_path, when):
    config, file = make(), tmp_path / "runs"
    hf_config = load_hf_config(config.model)
    ModelDims.from_config(hf_config)  # is kept
    code = f"open({str(file)!r}, 'x'); import time; time.sleep(60)"
    monkeypatch.setattr(compile_ahead, "ahead_codes", lambda _: (code, "pass"))
    read, write = os.pipe()
    if not (run := os.fork()):
        try:  # this is a copy of the tests' process, of which nothing may go on
            ahead = CompileAhead(config, WORLD)
            ahead.begin(hf_config)
            assert ahead.update._started is not None
            os.write(write, str(ahead.update._started.process.pid).encode())
            until = time.monotonic() + 20
            while when != "at once" and not file.exists() and time.monotonic() < until:
                time.sleep(0.01)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    process = int(os.read(read, 20))
    os.close(read)
    os.waitpid(run, 0)
    try:
        until = time.monotonic() + 20
        while lives(process):
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        if lives(process):
            os.kill(process, signal.SIGKILL)


def lives(process):
    """Not a zombie either, of which nobody has asked for the exit code."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def test_it_imports_what_the_run_imports_and_nothing_from_the_current_folder(make, monkeypatch, caplog, tmp_path):
    for name in ("ctypes", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the current folder')")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "only_here.py").touch()
    config = make()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "own")
    with begun(config, monkeypatch, "import json, only_here") as ahead:
        ahead.wait()
    assert not caplog.records


def test_a_failure_is_said_once_and_tried_again_in_the_next_run(make, monkeypatch, caplog):
    for _ in range(2):
        with begun(make(), monkeypatch, "raise MemoryError('no room')") as ahead:
            ahead.wait()
    assert [record.message for record in caplog.records] == [
        "compiling the first update ahead failed (MemoryError: no room): the first update compiles what is missing"
    ] * 2


def test_of_an_error_with_several_lines_the_first_is_said(make, monkeypatch, caplog):
    """PyTorch ends its errors of torch.compile with advice for its authors."""
    code = "raise OSError(28, 'No space left on device\\n\\nSet TORCH_LOGS for more')"
    with begun(make(), monkeypatch, code) as ahead:
        ahead.wait()
    said = "compiling the first update ahead failed (OSError: [Errno 28] No space left on device): "
    assert caplog.messages == [said + compile_ahead.INSTEAD]


def code(ahead):
    return ahead.update._started.process.returncode


@pytest.mark.parametrize("error", [False, True])
def test_a_process_that_hangs_is_ended(make, monkeypatch, caplog, error):
    monkeypatch.setattr(compile_ahead, "PATIENCE_S", 0.05)
    ahead = begun(make(), monkeypatch, "import time; time.sleep(60)")
    try:
        with ahead:
            if error:
                raise KeyError
            ahead.wait()
            assert "was not done" in caplog.text
            assert code(ahead) == -9, "it would still have the GPU's memory when vLLM starts"
    except KeyError:
        assert code(ahead) == -9


@pytest.mark.parametrize(("world", "key"), [(World(0, 2, torch.device("cpu")), "true"), (WORLD, "false")])
def test_there_is_none_for_several_ranks_and_layers_that_run_uncompiled(make, world, key):
    config = make(f"model.compile={key}")
    with CompileAhead(config, world) as ahead:
        ahead.begin(load_hf_config(config.model))
        assert not ahead.update.is_begun
        ahead.wait()


def test_a_process_that_began_to_import_early_is_the_one_that_works(make, monkeypatch, caplog):
    codes = "import sys; print(len(sys.stdin.buffer.read())); sys.exit('read')", "import sys; sys.stdin.buffer.read()"
    monkeypatch.setattr(compile_ahead, "ahead_codes", lambda _: codes)
    config = make()
    with second.importing_early(codes):
        begun_early = [second._early[code].process for code in codes]
        with CompileAhead(config, WORLD) as ahead:
            ahead.begin(load_hf_config(config.model))
            assert ahead.update._started is not None and ahead.update._started.process is begun_early[0]
            assert begun_early[1].returncode == -9, "it waits for what never comes"
            ahead.wait()
    assert caplog.messages == [f"compiling the first update ahead failed (read): {compile_ahead.INSTEAD}"]
    with second.importing_early(codes):
        begun_early = [second._early[code].process for code in codes]
    assert [process.returncode for process in begun_early] == [-9, -9] and not second._early


@pytest.mark.parametrize(
    ("where", "name", "value"), [(sys, "executable", None), (tempfile, "tempdir", "/no/such/folder")]
)
def test_what_prevents_early_imports_does_not_end_the_run(make, monkeypatch, caplog, where, name, value):
    config = make()
    hf_config = load_hf_config(config.model)
    monkeypatch.setattr(where, name, value)
    with second.importing_early(["pass"]), CompileAhead(config, WORLD) as ahead:
        ahead.begin(hf_config)
    (said,) = caplog.messages
    assert said.startswith("compiling ahead did not begin (") and not second._early


def test_what_imports_early_is_likely_to_be_needed(monkeypatch, tmp_path):
    monkeypatch.setattr(early, "GPU", tmp_path)
    codes = early.early_codes(str(tmp_path), 1)
    assert codes == second.ahead_codes(str(tmp_path)) and len(codes) == 2
    assert not early.early_codes(str(tmp_path), 2)
    (tmp_path / "inductor" / "compiled_ahead").mkdir(parents=True)
    assert not early.early_codes(str(tmp_path), 1)
    assert early.early_codes(str(tmp_path / "other"), 1)
    monkeypatch.setattr(early, "GPU", tmp_path / "none")
    assert not early.early_codes(str(tmp_path / "other"), 1)


@pytest.mark.slow
def test_the_second_processes_call_what_there_is(make, caplog):
    """By their real code, with a model that the one does not find, and without vLLM."""
    config = make()
    config.model.path = "/no/such/model"
    ahead = CompileAhead(config, WORLD)
    for process in (ahead.update, ahead.sampler):
        process.begin(config if process is ahead.update else (config, False), Path("/no/such/file"))
    ahead.wait()
    ahead.update.end()
    ahead.sampler.end()
    first, last = caplog.messages
    assert first.startswith("compiling vLLM's model ahead failed (") and "'vllm'" in first
    assert last.startswith("compiling the first update ahead failed (") and "/no/such/model" in last


GPU = World(0, 1, torch.device("cuda"))


@pytest.fixture
def with_vllm(make, monkeypatch, tmp_path):
    """Of a host with a GPU and vLLM: configs, and whether a run of one begins a process that compiles vLLM's model."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    monkeypatch.setattr(compile_ahead.metadata, "version", lambda _: "0.26.0")
    monkeypatch.setattr(compile_ahead, "attention_choice", lambda *_: AttentionChoice())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(compile_ahead, "ahead_codes", lambda _: ("pass", "pass"))

    def begins(*keys, world=GPU, leave=lambda ahead: ahead.wait()):
        config = make("rollout.engine=vllm", *keys)
        with CompileAhead(config, world) as ahead:
            ahead.begin(load_hf_config(config.model))
            leave(ahead)
            return ahead.sampler.is_begun

    return begins


def test_vllms_model_is_compiled_once_for_what_its_code_depends_on(with_vllm):
    assert with_vllm()
    for keys in ((), ("seed=7",), ("optim.lr=1e-6",), ("rollout.gpu_memory_utilization=0.3",)):
        assert not with_vllm(*keys)
    for keys in (("rollout.max_completion_tokens=9",), ("rollout.max_concurrent=9",), ("rollout.sleep=always",)):
        assert with_vllm(*keys)
        assert not with_vllm(*keys)


def test_the_run_imports_what_vllm_needs_while_it_waits(with_vllm, monkeypatch):
    imported = []
    monkeypatch.setattr(compile_ahead.vllm_start, "is_installed", lambda: True)
    monkeypatch.setattr(compile_ahead.vllm_start, "import_engine", imported.append)
    assert with_vllm() and imported == [GPU.device]
    assert not with_vllm() and imported == [GPU.device], "nobody waits"


def test_a_run_that_started_vllm_by_itself_has_compiled_its_model(with_vllm, monkeypatch, caplog):
    monkeypatch.setattr(compile_ahead, "ahead_codes", lambda _: ("pass", "raise MemoryError('no room')"))
    assert with_vllm()
    assert with_vllm(leave=lambda ahead: ahead.sampler_started())
    assert not with_vllm(leave=lambda ahead: ahead.sampler_started())
    assert caplog.messages == [
        "compiling vLLM's model ahead failed (MemoryError: no room): vLLM compiles when it starts"
    ]


def test_vllms_model_is_compiled_ahead_only_where_it_is_compiled_and_has_room(with_vllm, make, monkeypatch):
    assert not with_vllm("rollout.enforce_eager=true")
    assert not with_vllm("rollout.engine=embedded")
    assert not with_vllm(world=WORLD)
    assert not with_vllm(world=World(0, 2, GPU.device))
    config = make("rollout.engine=vllm")
    dims = ModelDims.from_config(load_hf_config(config.model))
    needed = compile_ahead.sampler_gib(config, dims, GPU)
    assert needed > compile_ahead.CONTEXT_GIB + compile_ahead.VLLM_ACTIVATIONS_GIB
    for free, wanted in ((2.01 * needed, needed), (1.99 * needed, 0)):
        monkeypatch.setattr(compile_ahead, "free_beside_policy", lambda *_, free=free: free)
        assert compile_ahead.sampler_gib(config, dims, GPU) == pytest.approx(wanted)


def test_what_the_policy_leaves_free(make):
    config = make("model.dtype=float32")
    dims = ModelDims.from_config(load_hf_config(config.model))
    sizes: Any = plan_sizes(config, dims, WORLD, WORLD.device)
    sizes["recompute"] = ["none"] * dims.layers
    plan = memory_plan(dims, **sizes)
    used = plan.weights + plan.moments
    assert free_beside_policy(config, dims, WORLD) == pytest.approx(
        USABLE_SHARE * gpu_memory(WORLD.device) / GIB - used
    )
