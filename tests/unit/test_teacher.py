"""On-policy distillation: the update against the same done with two untouched models, and teachers that cannot teach."""

import json
import runpy
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import making
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import pgrpo
from pgrpo.algorithm.loss import Counts, policy_loss
from pgrpo.commands.plan import plan_text
from pgrpo.config import ConfigError, LossConfig, load_config
from pgrpo.distributed.world import World
from pgrpo.grpo import backward, update_policy
from pgrpo.model.policy import Policy
from pgrpo.planning.dims import ModelDims
from pgrpo.planning.memory import memory_plan
from pgrpo.training.build import build as build_parts
from pgrpo.training.progress import Progress
from pgrpo.training.update import count, micro_batches

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [[5, 6, 7, 13], [8, 4], [3, 3, 9]]
COMPLETIONS = [[[4, 5, 1], [6, 1], [7, 8, 9, 1]], [[1], [5, 5, 1], [9, 9]], [[2, 4], [6, 7, 8, 1], [3, 1]]]
REWARDS = [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]
TEMPERATURE = 0.7


def make_teacher(tiny_model, folder, vocabulary=None, **sizes):
    """Wider and deeper than the tiny model, with its tokenizer."""
    own = json.loads((tiny_model / "config.json").read_text())
    del own["layer_types"]  # follow the number of layers
    sizes = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3} | sizes
    torch.manual_seed(7)
    config = Qwen3Config(**(own | sizes | {"vocab_size": vocabulary or own["vocab_size"], "initializer_range": 0.2}))
    Qwen3ForCausalLM(config).save_pretrained(folder)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tiny_model, tmp_path_factory):
    return make_teacher(tiny_model, tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def build(tiny_model, teacher, tmp_path):
    """A function: overrides -> the parts of a run that has not begun."""
    torch.set_num_threads(1)
    with ExitStack() as stack:

        def make(*overrides):
            keys = [
                f"model.path={tiny_model}",
                f"run_dir={tmp_path / 'run'}",
                f"loss.teacher={teacher}",
                "eval.every=0",
            ]
            keys += ["rewards.functions=[]", f"rollout.temperature={TEMPERATURE}", "optim.lr=1e-3"]
            config = load_config("quickstart", [*keys, *overrides])
            return stack.enter_context(build_parts(config, World(0, 1, torch.device("cpu"))))

        yield make


def make_groups(advantages=REWARDS):
    return [
        making.group(prompt, *(making.episode(ids, a, advantage=a) for ids, a in zip(own, given, strict=True)))
        for prompt, own, given in zip(PROMPTS, COMPLETIONS, advantages, strict=True)
    ]


def full_logprobs(model, prompt, ids):
    """[R, V] at the rollout's temperature, of one unpadded sample."""
    return (model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)


def long_way(tiny_model, teacher, form, advantages, coef):
    """Loss, KL a token and gradients, written out for the untouched models, one sample a call."""
    student, model = (
        AutoModelForCausalLM.from_pretrained(p, attn_implementation="sdpa") for p in (tiny_model, teacher)
    )
    loss, distance, tokens = torch.zeros(()), 0.0, sum(len(ids) for own in COMPLETIONS for ids in own)
    for prompt, own, given in zip(PROMPTS, COMPLETIONS, advantages, strict=True):
        for ids, advantage in zip(own, given, strict=True):
            logp = full_logprobs(student, prompt, ids)
            with torch.no_grad():
                logq = full_logprobs(model, prompt, ids)[:, : logp.shape[1]].log_softmax(-1)
            for t, token in enumerate(ids):
                ratio = (logp[t, token] - logp[t, token].detach()).exp()
                gap = (logp[t, token] - logq[t, token]).item()
                kl = (logp[t].exp() * (logp[t] - logq[t])).sum()
                if form == "sampled":
                    loss = loss - ratio * (advantage - coef * gap) / tokens
                    distance += gap / tokens
                else:
                    loss = loss - (ratio * advantage - coef * kl) / tokens
                    distance += kl.item() / tokens
    loss.backward()
    return loss.item(), distance, {n: p.grad for n, p in Policy(student).named_parameters() if p.grad is not None}


def gradients(parts, groups):
    for batch in micro_batches(parts.learner, groups):
        backward(parts.learner, batch, count(groups))
    named = {n: p.grad.clone() for n, p in parts.policy.named_parameters() if p.grad is not None}
    parts.learner.optimizer.zero_grad()
    return named


@pytest.mark.parametrize("attention", ["grouped", "repeated"])
@pytest.mark.parametrize("form", ["sampled", "full"])
def test_an_update_equals_the_long_way_with_two_untouched_models(build, tiny_model, teacher, form, attention):
    parts = build(f"loss.teacher_kl={form}", "loss.teacher_coef=0.6", f"model.attention={attention}")
    for advantages in (REWARDS, [[0.0] * 3] * 3):  # with a reward beside it, and without one
        groups = make_groups(advantages)
        loss, distance, wanted = long_way(tiny_model, teacher, form, advantages, 0.6)
        assert distance > 0.5
        got = gradients(parts, groups)
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=2e-6, msg=name)
    before = {n: p.clone() for n, p in parts.learner.teacher.named_parameters()}
    metrics = update_policy(parts.learner, Progress(), groups)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5) and metrics["teacher/kl"] == pytest.approx(
        distance, abs=1e-5
    )
    assert all(torch.equal(p, before[n]) and not p.requires_grad for n, p in parts.learner.teacher.named_parameters())


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_a_teacher_may_have_ids_that_no_token_has(tiny_model, tmp_path, build, form):
    """Some models pad their vocabulary. Of the full KL these ids are left out of the teacher's distribution."""
    padded = make_teacher(tiny_model, tmp_path / "padded", vocabulary=20)
    parts = build(f"loss.teacher={padded}", f"loss.teacher_kl={form}")
    wanted = long_way(tiny_model, padded, "full", REWARDS, 1.0)[2]
    got = gradients(parts, make_groups())
    if form == "full":
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=2e-6, msg=name)
    assert got.keys() == wanted.keys()


@pytest.mark.parametrize(("form", "passes"), [("sampled", 1), ("full", 3)])
def test_a_teacher_reads_each_prompt_once_and_a_batch_once_for_all_epochs(build, form, passes, monkeypatch):
    """Its log-probs are kept; over a vocabulary they would not fit."""
    parts, rows = build(f"loss.teacher_kl={form}", "train.epochs_per_step=3"), []
    hidden = Policy._hidden

    def counted(policy, inputs, *more):
        if policy is parts.learner.teacher:
            rows.append(len(inputs["input_ids"]))
        return hidden(policy, inputs, *more)

    monkeypatch.setattr(Policy, "_hidden", counted)
    update_policy(parts.learner, Progress(), make_groups())
    completions = sum(len(ids) for own in COMPLETIONS for ids in own)
    assert rows == [sum(map(len, PROMPTS)) + completions] * passes


def test_lora_has_the_initial_model_as_reference_and_another_as_teacher(build, tiny_model, teacher):
    parts = build("model.lora_rank=4", "loss.kl_coef=0.1", "loss.teacher_kl=full")
    assert parts.learner.teacher is not None and parts.learner.reference is parts.policy
    metrics = update_policy(parts.learner, Progress(), make_groups())
    assert metrics["kl"] == 0 and metrics["grad_norm"] > 0  # adapters that add zero
    assert metrics["teacher/kl"] == pytest.approx(long_way(tiny_model, teacher, "full", REWARDS, 1.0)[1], abs=1e-5)
    assert update_policy(parts.learner, Progress(), make_groups())["kl"] > 0


def test_a_run_without_a_reward_comes_closer_to_its_teacher(tiny_model, teacher, tmp_path):
    keys = [f"model.path={tiny_model}", f"loss.teacher={teacher}", "rewards.functions=[]", "eval.every=0"]
    keys += ["train.steps=30", "optim.lr=3e-3", "rollout.prompts_per_step=8", "track.console=false"]
    for form in ("sampled", "full"):
        run = pgrpo.train("quickstart", [*keys, f"run_dir={tmp_path / form}", f"loss.teacher_kl={form}"])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        kls = [row["teacher/kl"] for row in rows]
        assert sum(kls[-8:]) < 0.8 * sum(kls[:8])
        assert all(row["reward"] is None for row in rows)


def test_the_inputs_that_a_teacher_s_term_needs_must_be_there():
    x = torch.zeros(1, 1)
    for form, needed in (("sampled", "teacher_logprobs"), ("full", "teacher_kl")):
        with pytest.raises(ValueError, match=f"teacher_kl={form} needs {needed}"):
            policy_loss(x, x, x, x == 0, Counts(1, 1), LossConfig(teacher="t", teacher_kl=form), 1)  # pyright: ignore[reportArgumentType]


def refused(tmp_path, tiny_model, *overrides):
    keys = [f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", *overrides]
    with pytest.raises(ConfigError) as caught:
        build_parts(load_config("quickstart", keys), World(0, 1, torch.device("cpu")))
    return str(caught.value)


@pytest.mark.faults
def test_a_teacher_that_cannot_teach_is_refused_by_name(tiny_model, teacher, tmp_path, monkeypatch):
    def message(*overrides):
        return refused(tmp_path, tiny_model, *overrides)

    assert message("loss.teacher=/nowhere").startswith("loss.teacher=/nowhere: cannot load this model: ")
    other = shutil.copytree(teacher, tmp_path / "other")
    spoilt = json.loads((other / "tokenizer.json").read_text())
    words = spoilt["model"]["vocab"]
    words["3"], words["4"] = words["4"], words["3"]
    (other / "tokenizer.json").write_text(json.dumps(spoilt))
    assert message(f"loss.teacher={other}") == (
        f"loss.teacher={other}: it has other tokens than model.path={tiny_model}: '3' is {words['4']} there, and the teacher has "
        f"it as {words['3']}; name a teacher of the same family"
    )
    load = AutoTokenizer.from_pretrained
    with monkeypatch.context() as patched:
        patched.setattr(
            AutoTokenizer, "from_pretrained", lambda path, **given: load("/none" if path == str(teacher) else path)
        )
        text = f"loss.teacher={teacher}: cannot load its tokenizer, which must be the policy's: "
        assert message(f"loss.teacher={teacher}").startswith(text)
    small = make_teacher(tiny_model, tmp_path / "small", vocabulary=13)
    assert "its vocabulary of 13 ids is smaller than the policy's, 14" in message(f"loss.teacher={small}")
    short = make_teacher(tiny_model, tmp_path / "short", max_position_embeddings=10)
    assert message(f"loss.teacher={short}").startswith(
        f"loss.teacher={short}: it has 10 positions, the longest sample 12 "
    )
    assert message(f"loss.teacher={teacher}", "loss.ratio=sequence").startswith("loss.teacher_kl: sampled gives each ")
    for key, value in (("teacher_kl", "full"), ("teacher_coef", "0.5"), ("teacher_offload", "cpu")):
        text = f"loss.{key}: {value} has no effect while loss.teacher is None; set loss.teacher, or leave it out"
        assert message(f"loss.{key}={value}") == text
    assert "there is no GPU to offload from" in message(f"loss.teacher={teacher}", "loss.teacher_offload=cpu")


@pytest.mark.faults
def test_what_needs_a_reward_is_refused_without_one(tiny_model, teacher, tmp_path):
    def message(*overrides):
        return refused(tmp_path, tiny_model, f"loss.teacher={teacher}", *overrides)

    assert "rewards.functions: [] scores nothing" in refused(tmp_path, tiny_model, "rewards.functions=[]")
    assert message("rewards.functions=[]").startswith(
        "eval.every: 400 needs a reward; name one in rewards.functions, with "
    )
    none = ("rewards.functions=[]", "eval.every=0")
    assert message(*none, "train.target_reward=1.0").startswith("train.target_reward: 1.0 needs a reward")
    for given in (none, ("rewards.functions[0].weight=0",)):
        assert message(*given, "rollout.resample_limit=2").startswith(
            "rollout.resample_limit: 2 would resample every group"
        )


def test_the_memory_plan_counts_the_teacher(tiny_model, teacher):
    heads: dict[str, Any] = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
    small, large = (
        ModelDims.from_config(Qwen3Config(hidden_size=h, intermediate_size=3 * h, num_hidden_layers=n, num_attention_heads=q,
                                          tie_word_embeddings=tied, **heads))
        for h, n, q, tied in ((1024, 28, 16, True), (4096, 36, 32, False))
    )  # fmt: skip
    sizes = {"token_budget": 16384, "recompute": ["none"] * 28, "dtype_bytes": 2, "ranks": 4}
    plain, with_teacher = memory_plan(small, **sizes), memory_plan(small, **sizes, teacher=large)
    weights, root = large.parameters / 4, 2 * 151936 * 4096
    assert with_teacher.teacher == pytest.approx(2 * (weights + root) / 2**30)
    for phase in ("resting", "rollout", "update", "optimizer_step"):
        more = getattr(with_teacher, phase) - getattr(plain, phase)
        assert more == pytest.approx(with_teacher.teacher), phase
    offloaded = memory_plan(small, **sizes, teacher=large, teacher_offload=True)
    assert offloaded.teacher == pytest.approx(2 * root / 2**30)
    full = memory_plan(small, **sizes, teacher=large, full_kl=True)
    assert full.update - with_teacher.update == pytest.approx(16384 * 4096 * 2 / 2**30)
    # Of a kept prefix each layer has keys and values of 8 heads: the policy's with their gradients, the teacher's without.
    kept = memory_plan(small, **sizes, teacher=large, full_kl=True, kept_tokens=1024).kept
    assert kept == pytest.approx(1024 * (2 * 28 + 36) * 2 * 8 * 128 * 2 / 2**30)
    # Where the policy recomputes everything, the teacher's pass over a micro-batch may be the peak.
    tight = sizes | {"token_budget": 2**17, "recompute": ["full"] * 28}
    update = memory_plan(small, **tight, teacher=large)
    assert update.teacher_forward > 2**17 * 2 * (4 * 12288 + 2 * 4096) / 2**30
    # Beside it is what the policy's last micro-batch left gathered: embedding and head, and layers that stay.
    untied = memory_plan(replace(small, tied=False), **tight, teacher=large)
    assert untied.teacher_forward - update.teacher_forward == pytest.approx(2 * 151936 * 1024 / 2**30)
    layer = 2 * (1024 * 128 * (16 + 8 + 8) + 16 * 128 * 1024 + 3 * 1024 * 3072) / 2**30
    for number in (1, 26, 27, 28):
        staying = memory_plan(small, **tight, teacher=large, stay_gathered=number)
        assert staying.update - update.update == pytest.approx(number * layer)
    # With the full KL it comes while the policy keeps a prefix: layers' inputs, keys and values.
    alone, beside = (memory_plan(small, **tight, teacher=large, full_kl=True, kept_tokens=n) for n in (0, 2**16))
    more = 2 * 2**16 * 28 * 1024 / 2**30 + beside.kept
    assert beside.teacher_forward - alone.teacher_forward == pytest.approx(more)
    config = load_config("quickstart", [f"model.path={tiny_model}", "run_dir=runs/x"])
    before = plan_text(config)
    config.loss.teacher = str(teacher)
    number = AutoModelForCausalLM.from_pretrained(teacher).num_parameters()
    assert f"teacher       {teacher}: {number:,} parameters, frozen" in plan_text(config) and "teacher " not in before


def test_evaluation_needs_no_teacher(tiny_model, tmp_path):
    run = runpy.run_path(str(ROOT / "pgrpo" / "commands" / "evaluate.py"))["evaluate"]
    keys = [f"model.path={tiny_model}", f"run_dir={tmp_path / 'run'}", "eval.rows=4", "eval.greedy=false"]
    config = load_config("quickstart", keys)
    config.loss.teacher = "/gone"
    assert 0 <= run(config)["eval/reward"] <= 1
    config.rewards.functions = []
    with pytest.raises(ConfigError, match=r"rewards.functions: \[\] scores nothing"):
        run(config)
