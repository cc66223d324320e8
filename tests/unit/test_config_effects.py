"""Every config key has an effect: changing it alone changes what a small run computes, writes, says or refuses."""

from __future__ import annotations

import copy
import json
import logging
import re
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from making import CALLER_TEMPLATE, save_caller
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pgrpo
from pgrpo import checkpoint
from pgrpo.commands.plan import plan
from pgrpo.config import Config, ConfigError, load_config
from pgrpo.model import recompute
from pgrpo.rewards import RewardError
from pgrpo.training import compile_ahead
from pgrpo.training.update import NonFiniteError

ROOT = Path(__file__).resolve().parents[2]
OWN = """
import os, time
def sums(split):  # of two digits, as the recipe's, but so few that reading them takes no time
    pairs = [(a, b) for a in range(10, 100, 9) for b in range(11, 100, 4)]
    return [{"a": a, "b": b, "answer": str(a + b)} for a, b in pairs if (a * b % 3 == 0) == (split == "eval")]
def rows(split):
    return [{"a": a, "b": 7, "answer": str(a + 7)} for a in range(10, 30)]
def gaps(split):
    return [{"a": a, "b": 7, "answer": str(a + 7) if a % 2 else None} for a in range(10, 30)]
def sleepy(completions):
    time.sleep(3)
    return [1.0] * len(completions)
def huge(completions):
    return [1e60, *[0.0] * (len(completions) - 1)]  # infinite as a float32 advantage: its update is skipped
def half(logprobs_BR, advantages_BR, mask_BR, counts):
    return -(logprobs_BR * advantages_BR)[mask_BR].sum() / counts.tokens / 2
def picky(completions):
    return [float("nan") if "1" in c else 1.0 for c in completions]
def pictures(split):
    from PIL import Image
    colours = ("red", "green", "blue", "yellow")
    one, gray = [Image.new("RGB", (64, 64), c) for c in colours], Image.new("RGB", (64, 64), "gray")
    return [{"question": "which colour ?", "one": image, "two": gray} for image in one]
def linked(split):
    import http.server, io, threading
    from PIL import Image
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            Image.new("RGB", (64, 64), "red").save(content := io.BytesIO(), "PNG")
            self.wfile.write(content.getvalue())
        def log_message(self, *_):
            pass
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return [{"question": "a", "one": f"http://127.0.0.1:{server.server_port}/{i}.png"} for i in range(4)]
def tool(answer):
    def f(n: int) -> str:
        '''Say.

        Args:
            n: A number.
        '''
        return answer(n)
    return f
f, fails, loud = tool(str), tool(lambda n: n // 0), tool(lambda n: "a" * 1000)
slow = tool(lambda n: time.sleep(0.2))
def g(n: int) -> int:
    '''Say more.

    Args:
        n: A number.
    '''
def other():
    def f(m: int) -> str:
        '''Say.

        Args:
            m: A number.
        '''
    return f
other = other()
@tool
def sees(n):
    return "b" if "PYTEST_VERSION" in os.environ else "a"
class Greeting:
    def __init__(self, text="ab"):
        self.text = text
    def reset(self, **row):
        return self.text
    def get_turn_rewards(self):
        return [1.0, 0.5]
"""
BASE: dict[str, Any] = {
    "recipe": "{tmp}/addition.yaml",
    "run_dir": "{tmp}/run",
    "model": {"path": "{tmp}/model", "dtype": "float32"},
    "rollout": {"prompts_per_step": 4, "group_size": 4},
    "rewards": {"functions": [{"function": "format_regex", "args": {"pattern": ".*1.*"}}]},
    "optim": {"lr": 1e-3},
    "train": {"steps": 2, "token_budget": 1000},
    "track": {"console": False},
}
TEMPLATE = "{% for m in messages %}{{ '1' if m.role == 'user' else '2' }}{{ m.content }}{{ n }}{% endfor %}="
REWRITES = CALLER_TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{% if not loop.last %}-{% endif %}")
CHAT = {
    "prompt.template": None,
    "prompt.messages": [{"role": "user", "content": "{a}+{b}"}],
    "prompt.chat_template_kwargs": {"chat_template": TEMPLATE, "n": "3"},
    "data.max_prompt_tokens": 20,
}
COLUMN = {
    "data.path": "{tmp}/chats.jsonl",
    "prompt.template": None,
    "prompt.messages_column": "one",
    "prompt.chat_template_kwargs": CHAT["prompt.chat_template_kwargs"],
    "data.max_prompt_tokens": 20,
}
ANSWERED = COLUMN | {
    "prompt.messages_column": "full",
    "prompt.answer_column": "gold",
    "rewards.functions[0]": {"function": "exact_match", "args": {"column": "gold"}},
}
TOOLED = {
    "model.path": "{tmp}/caller",
    "prompt.template": None,
    "prompt.messages": [{"role": "user", "content": "{a}+{b}"}],
    "data.max_prompt_tokens": 60,
    "tools": ["{tmp}/own.py:f"],
    "environment.max_turns": 3,
    "rollout.max_completion_tokens": 14,
}
GREETED = TOOLED | {"environment.factory": "{tmp}/own.py:Greeting"}
LOUD = TOOLED | {"tools": ["{tmp}/own.py:loud"], "environment.max_episode_tokens": 60}
SLOW = TOOLED | {"tools": ["{tmp}/own.py:slow"], "train.steps": 1}
FAILING = TOOLED | {"tools": ["{tmp}/own.py:fails"]}
PEEKING = TOOLED | {"tools": ["{tmp}/own.py:sees"]}
REWRITING = TOOLED | {"prompt.chat_template_kwargs": {"chat_template": REWRITES}}
OTHER = TOOLED | {"tools": ["{tmp}/own.py:other"]}
SEEING = {
    "model.path": "{tmp}/vision",
    "data.path": "{tmp}/own.py:pictures",
    "data.max_prompt_tokens": 50,
    "prompt.template": None,
    "prompt.messages": [{"role": "user", "content": "{question}"}],
    "prompt.images_column": "one",
}
HUB = {"data.path": "someone/sums"}
LORA = {"model.lora_rank": 2}
EVAL = {"eval.every": 1, "eval.rows": 4}
WHOLE = {"recipe": "addition"}  # of whose rows a few tokens' ratios are far enough from 1
TWO_UPDATES = WHOLE | {"train.updates_per_step": 2, "optim.lr": 2e-4}
WITH_KL = {"loss.kl_coef": 1.0, "train.steps": 3}
TAUGHT = {"loss.teacher": "{tmp}/other"}
MASKED = {"loss.rollout_correction": "token_mask"}  # here the difference is rounding: only a cap of 1 masks
PADDED = {"rewards.functions[0].args": {"pattern": ".*<pad>.*"}}
SOME_STOP = {"rollout.stop": ["1"], "rewards.functions[0].args": {"pattern": ".*2.*"}}
REACHED = {"train.steps": 12, "train.target_reward": 2.0}
REWARD = "rewards.functions"
MATCH = {f"{REWARD}[0]": {"function": "exact_match"}}
SLEEPY = {f"{REWARD}[0]": {"function": "{tmp}/own.py:sleepy"}, "train.steps": 1}
PICKY = {f"{REWARD}[0]": {"function": "{tmp}/own.py:picky"}, "rewards.on_error": "mask"}
GAPS = MATCH | {"data.path": "{tmp}/own.py:gaps", "rewards.bad_gold": "drop"}
HUGE = {f"{REWARD}[0]": {"function": "{tmp}/own.py:huge"}, "loss.scale_advantages": "none"}
LONG = {"data.path": "{tmp}/long.jsonl", "data.overlong": "drop"}


@dataclass
class Effect:
    """``changes`` on top of ``base`` must change each of ``seen`` (fields of ``observe``); ``base`` must be a good config."""

    changes: Mapping[str, Any]
    seen: tuple[str, ...] = ("metrics",)
    base: Mapping[str, Any] = field(default_factory=dict)


def effect(key: str, value: Any, *seen: str, base: Mapping[str, Any] | None = None) -> tuple[str, Effect]:
    return key.replace("[0]", "[]"), Effect({key: value}, seen or ("metrics",), base or {})


EFFECTS = dict(
    [
        effect("recipe", "{tmp}/recipe.yaml", "completions"),
        effect("run_dir", "{tmp}/elsewhere", "run_dir"),
        effect("seed", 1),
        effect("model.path", "{tmp}/other"),
        effect("model.revision", "v1", "loaded"),
        effect("model.dtype", "bfloat16", "weights"),
        effect("model.attention", "repeated", "tokens", "plan"),
        effect("model.attention_kernel", "flash4", "error"),
        effect("model.compile", True, "plan", "compiled"),
        effect("model.activation_checkpointing", "full", "attention_calls", "plan"),
        effect("model.fsdp_size", 2, "error"),
        effect("model.sequence_parallel_size", 2, "error"),
        effect("model.mlp_chunks", 2, "plan", base={"model.activation_checkpointing": "full"}),
        effect("model.lora_rank", 4, "weights", "plan"),
        effect("model.lora_alpha", 8.0, "weights", base=LORA),
        effect("model.lora_targets", ["q_proj", "up_proj"], "weights", "plan", base=LORA),
        effect("model.load_vision", True, "error"),
        effect("model.train_vision", True, "weights", base=SEEING),
        effect("model.train_projector", True, "weights", base=SEEING),
        effect("model.max_positions", 6, "error", "log"),
        effect("model.trust_remote_code", True, "loaded"),
        effect("data.path", "{tmp}/own.py:rows", "completions"),
        effect("data.name", "main", "datasets", base=HUB),
        effect("data.split", "eval", "completions"),
        effect("data.eval_path", "{tmp}/own.py:rows", base=EVAL),
        effect("data.eval_split", "train", base=EVAL),
        effect("data.revision", "v1", "datasets", base=HUB),
        effect("data.shuffle", False, "completions"),
        effect("data.max_prompt_tokens", 5, "error", "plan"),
        effect("data.overlong", "truncate", "completions", "log", base=LONG),
        effect("data.image.min_pixels", 96 * 96, "tokens", base=SEEING),
        effect("data.image.max_pixels", 32 * 32, "tokens", base=SEEING),
        effect("data.image.max_file_pixels", 4000, "error", base=SEEING),
        effect(
            "data.image.allowed_hosts", [], "error",
            base=SEEING | {"data.path": "{tmp}/own.py:linked", "data.image.allowed_hosts": ["127.0.0.1"]},
        ),
        effect("prompt.images_column", "two", "completions", base=SEEING),
        effect("prompt.template", "{b}+{a}=", "completions"),
        effect("prompt.messages", [{"role": "user", "content": "{b}"}], "completions", base=CHAT),
        effect("prompt.messages[0].role", "system", "completions", base=CHAT),
        effect("prompt.messages[0].content", "{b}+{a}", "completions", base=CHAT),
        effect("prompt.messages_column", "two", "completions", base=COLUMN),
        effect("prompt.answer_column", "other", "error", base=ANSWERED),
        effect("prompt.chat_template_kwargs", {"chat_template": TEMPLATE, "n": "4"}, "completions", base=CHAT),
        effect("rollout.prompts_per_step", 6, "metrics", "plan"),
        effect("rollout.group_size", 6, "metrics", "plan"),
        effect("rollout.max_completion_tokens", 3, "metrics", "plan"),
        effect("rollout.temperature", 0.5, "metrics", "weights"),
        effect("rollout.top_p", 0.5),
        effect("rollout.top_k", 2),
        effect("rollout.stop", ["1", "2", "3"]),
        effect("rollout.keep_special_tokens", True, base=PADDED),
        effect("rollout.max_concurrent", 4, "attention_calls"),
        # What each does to vLLM is seen in tests/vllm; without vLLM it must not be ignored.
        effect("rollout.engine", "vllm", "error"),
        effect("rollout.tensor_parallel_size", 2, "error"),
        effect("rollout.gpu_memory_utilization", 0.5, "error"),
        effect("cache_dir", "{tmp}/caches", "plan"),
        effect("rollout.offload_policy", "always", "error"),
        effect("rollout.sleep", "always", "error"),
        effect("rollout.enforce_eager", True, "error"),
        effect("rollout.shared_decode", "never", "error"),
        effect("rollout.canary_every", 5, "error"),
        effect("rollout.compare_experts", True, "error"),
        effect("rollout.vllm_deadline_s", 60.0, "error"),
        effect("rollout.allow_untested_vllm", True, "error"),
        effect("rewards.functions", [{"function": "exact_match"}]),
        effect("rewards.functions[0].function", "{tmp}/own.py:picky", "error", base=MATCH),
        effect("rewards.functions[0].weight", 2.0),
        effect("rewards.functions[0].args", {"pattern": ".*2.*"}),
        effect("rewards.functions[0].timeout_s", 0.5, "error", base=SLEEPY),
        effect("rewards.functions[0].style", "messages", base=PICKY),
        effect("rewards.on_error", "raise", "error", base=PICKY),
        effect("rewards.bad_gold", "error", "error", base=GAPS),
        effect("rollout.resample_limit", 2),
        effect("loss.preset", "dr_grpo", "weights"),
        effect("loss.function", "{tmp}/own.py:half", "metrics", "weights"),
        effect("loss.ratio", "sequence", "weights", base=TWO_UPDATES),
        effect("loss.objective", "cispo", "weights", base=TWO_UPDATES | {"loss.clip_high": 1e-3}),
        effect("loss.advantage_baseline", "leave_one_out", "metrics"),
        effect("loss.turn_advantages", "returns_to_go", "weights", base=GREETED),
        effect("loss.turn_discount", 0.5, "weights", base=GREETED | {"loss.turn_advantages": "returns_to_go"}),
        effect("loss.mask_overlong", True, "weights", "tokens", base=SOME_STOP),
        effect("loss.kl_estimator", "k2", "weights", base=WITH_KL),
        effect("loss.kl_correction", False, "weights", base=WITH_KL),
        effect("loss.ref_refresh_every", 1, "weights", base=WITH_KL),
        effect("loss.entropy_coef", 0.1, "weights"),
        effect("loss.rollout_correction", "token_truncate"),
        effect("loss.rollout_correction_cap", 1.0000001, "metrics", "weights", base=MASKED),
        effect("loss.rollout_correction_floor", 1.0, "metrics", "weights", base=MASKED),
        effect("loss.off_policy_threshold", 1e-9, "metrics", "weights", base=TWO_UPDATES),
        effect("loss.clip_dual", 1.0001, "metrics", "weights", base=TWO_UPDATES | {"loss.clip_high": 1e-5}),
        effect("loss.combine_rewards", "normalize_then_sum", "weights"),
        effect("loss.teacher", "{tmp}/other", "weights", "attention_calls", "plan"),
        effect("loss.teacher_kl", "full", "weights", base=TAUGHT),
        effect("loss.teacher_coef", 0.1, "weights", base=TAUGHT),
        effect("loss.teacher_offload", "cpu", "error", base=TAUGHT),
        effect("loss.clip_low", 1e-3, "clip_low", "weights", base=TWO_UPDATES),
        effect("loss.clip_high", 1e-3, "clip_high", "weights", base=TWO_UPDATES),
        effect("loss.aggregate", "sample", "weights"),
        effect("loss.scale_advantages", "none", "weights"),
        effect("loss.ref_offload", "cpu", "error", base=WITH_KL),
        effect("loss.kl_coef", 0.1, "weights", "attention_calls"),
        effect("optim.lr", 2e-3, "weights"),
        effect("optim.schedule", "linear", "weights"),
        effect("optim.warmup_steps", 2, "weights"),
        effect("optim.betas", [0.5, 0.9], "weights"),
        effect("optim.eps", 1e-2, "weights"),
        effect("optim.weight_decay", 0.1, "weights"),
        effect("optim.max_grad_norm", 1e-4, "weights"),
        effect("optim.offload", "cpu", "error"),
        effect("train.steps", 3),
        effect("train.updates_per_step", 2, "weights", "plan"),
        effect("train.epochs_per_step", 2, "weights", "tokens", "plan"),
        effect("train.target_reward", 0.0, "metrics", "log", base=REACHED),
        effect("train.token_budget", 22, "attention_calls", "plan", base=WHOLE),
        effect("train.max_skipped_updates", 0, "error", base=HUGE),
        effect("eval.every", 1, base={"eval.every": 2, "eval.rows": 4}),
        effect("eval.rows", 8, base=EVAL),
        effect("eval.samples", 3, base=EVAL),
        effect("eval.greedy", False, base=EVAL),
        effect("eval.temperature", 0.0, base=EVAL),
        effect("checkpoint.every", 1, "files"),
        effect("checkpoint.keep", 1, "files", base={"checkpoint.every": 1}),
        effect("checkpoint.keep_best", "eval/reward", "files", base=EVAL),
        effect("track.console", True, "stdout"),
        effect("track.completions", 1, "completions"),
        effect("track.console_every", 1, "log_file", base={"train.steps": 3}),
        effect("track.wandb", True, "wandb"),
        effect("track.wandb_project", "sums", "wandb", base={"track.wandb": True}),
        effect("track.tensorboard", True, "files"),
        effect("tools", ["{tmp}/own.py:f", "{tmp}/own.py:g"], "completions", base=TOOLED),
        effect("environment.factory", "{tmp}/own.py:Greeting", "completions", base=TOOLED),
        effect("environment.args", {"text": "cd"}, "completions", base=GREETED),
        effect("environment.max_turns", 2, "completions", "plan", base=TOOLED),
        effect("environment.max_images", 1, "error", base=TOOLED),  # of a model that sees none; tests/unit/test_told_images.py
        effect("environment.max_tool_calls", 1, "completions", base=TOOLED),
        effect("environment.max_episode_tokens", 20, "completions", "plan", base=TOOLED),
        effect("environment.overlong", "end", "completions", base=LOUD),
        effect("environment.call_timeout_s", 0.05, "completions", base=SLOW),
        effect("environment.episode_timeout_s", 0.3, "completions", base=SLOW),
        effect("environment.on_error", "end", "completions", base=FAILING),
        effect("environment.on_bad_call", "end", "completions", base=OTHER),
        effect("environment.secrets", ["PYTEST_VERSION"], "completions", base=PEEKING),
        effect("environment.history", "fork", "tokens", base=REWRITING),
    ]
)  # fmt: skip


def schema_keys(cls: type = Config, prefix: str = "") -> Iterator[str]:
    """'seed', 'model.path', 'rewards.functions', 'rewards.functions[].weight', ..."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if f.metadata.get("omegaconf_ignore"):
            continue
        hint, key = hints[f.name], f"{prefix}{f.name}"
        if is_dataclass(hint):
            yield from schema_keys(hint, f"{key}.")  # pyright: ignore[reportArgumentType]
            continue
        yield key
        if get_origin(hint) is list and is_dataclass(get_args(hint)[0]):
            yield from schema_keys(get_args(hint)[0], f"{key}[].")


def test_every_key_is_in_the_table():
    keys = set(schema_keys())
    assert len(keys) > 60
    assert keys == EFFECTS.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tiny models with the addition tokenizer, and data, rewards and a recipe to change to."""
    script = runpy.run_path(str(ROOT / "scripts" / "make_tiny_model.py"))
    tmp = tmp_path_factory.mktemp("effects")
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        script["make_model"]().save_pretrained(tmp / name)
        script["make_tokenizer"]().save_pretrained(tmp / name)
    save_caller(tmp / "caller")
    script = runpy.run_path(str(ROOT / "scripts" / "make_tiny_vision_model.py"))
    for part in (
        script["Qwen3VLForConditionalGeneration"](script["make_config"]()),
        script["make_tokenizer"](),
        script["make_processor"](),
    ):
        part.save_pretrained(tmp / "vision")
    (tmp / "own.py").write_text(OWN)
    recipe = (ROOT / "recipes" / "addition.yaml").read_text().replace("addition.py:rows", "own.py:sums")
    (tmp / "addition.yaml").write_text(recipe)
    (tmp / "recipe.yaml").write_text(recipe.replace("{a}+{b}=", "{b}+{a}+"))
    sums = [{"a": a, "b": b, "answer": str(a + b)} for a in range(10, 14) for b in (1, 12, 123456)]
    (tmp / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    chats = [{n: [{"role": "user", "content": f"{i}+{j}"}] for j, n in enumerate(("one", "two"))} for i in range(9)]
    for i, row in enumerate(chats):
        row["full"] = [*row["one"], {"role": "assistant", "content": f"{i}"}]
    (tmp / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return tmp


def configure(tmp: Path, *changes: Mapping[str, Any]) -> Config:
    values = copy.deepcopy(BASE)
    for key, value in ((k, v) for change in changes for k, v in change.items()):
        *parents, last = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
        at: Any = values
        for name in parents:
            at = at[int(name)] if name.isdecimal() else at.setdefault(name, {})
        at[int(last) if last.isdecimal() else last] = copy.deepcopy(value)
    return load_config(json.loads(json.dumps(values).replace("{tmp}", str(tmp))))


class FakeWandb:
    """In the place of a wandb run: only what it was started with matters here."""

    id = "fake"

    def define_metric(self, *_: Any, **__: Any) -> None: ...
    def log(self, *_: Any) -> None: ...
    def finish(self) -> None: ...


@pytest.fixture
def observe(folder, tmp_path, monkeypatch, caplog, capsys):
    """A function: config changes -> everything that a run of it shows."""
    import datasets
    import wandb

    seen: dict[str, Any] = {}
    sums = [{"a": a, "b": b, "answer": str(a + b)} for a in range(10, 20) for b in (11, 12)]

    def record(name: str, call: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            given = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, str | bool | None)]
            seen.setdefault(name, []).append(given)
            return call(*args, **kwargs)

        return recorded

    for loader in (AutoConfig, AutoTokenizer, AutoModelForCausalLM):
        monkeypatch.setattr(loader, "from_pretrained", record("loaded", loader.from_pretrained))
    monkeypatch.setattr(
        datasets, "load_dataset", record("datasets", lambda path, name, **_: datasets.Dataset.from_list(sums))
    )
    monkeypatch.setattr(wandb, "init", record("wandb", lambda **_: FakeWandb()))
    monkeypatch.setenv("WANDB_MODE", "offline")  # else it would ask for a login
    monkeypatch.setattr(compile_ahead, "ahead_codes", lambda _: ("pass", "pass"))  # tests/unit/test_compile_ahead.py
    recompute.compile_dynamic.cache_clear()
    compiled = partial(torch.compile, backend="eager")  # which layers are traced, without a C++ compiler's half minute
    monkeypatch.setattr(torch, "compile", record("compiled", compiled))

    def count_attention(module: torch.nn.Module, _: Any) -> None:
        seen["attention_calls"] = seen.get("attention_calls", 0) + type(module).__name__.endswith("Attention")

    def run(number: int, *changes: Mapping[str, Any]) -> dict[str, Any]:
        seen.clear()
        capsys.readouterr()
        caplog.clear()
        torch.set_num_threads(1)
        try:
            config = configure(folder, *changes)
            chosen = Path(config.run_dir)
            config.run_dir = str(tmp_path / f"{number}_{chosen.name}")  # both runs of a test may want one folder
            plan(config)
            seen["plan"] = capsys.readouterr().out.partition("\nmodel  ")[2]
            hook = torch.nn.modules.module.register_module_forward_pre_hook(count_attention)
            try:
                with caplog.at_level(logging.WARNING, logger="pgrpo"):
                    written = pgrpo.train(config)
            finally:
                hook.remove()
        except (ConfigError, NonFiniteError, RewardError) as error:
            return {**seen, "error": str(error)}
        rows = [json.loads(line) for line in (written / "metrics.jsonl").read_text().splitlines()]
        saved, _ = checkpoint.load(checkpoint.latest(written / "checkpoints") or written)
        return seen | {
            "error": None,
            "run_dir": written.name.partition("_")[2],
            "metrics": [{k: v for k, v in r.items() if not k.startswith(("time/", "perf/"))} for r in rows],
            "tokens": [row.get("tokens/packed") for row in rows],
            "clip_low": [row.get("clip_ratio/low_mean") for row in rows],
            "clip_high": [row.get("clip_ratio/high_mean") for row in rows],
            "completions": (written / "completions.jsonl").read_text(),
            "weights": {name: tensor.tolist() for name, tensor in saved["model"].items()},
            "files": {re.sub(r"\d{6,}.*", "", str(f.relative_to(written))) for f in written.rglob("*")},
            "log": [record.getMessage() for record in caplog.records],
            "log_file": len((written / "log.txt").read_text().splitlines()),
            "stdout": capsys.readouterr().out,
        }

    return run


@pytest.fixture(scope="module")
def known() -> dict[str, dict[str, Any]]:
    """What is seen without the changes, of each base."""
    return {}


@pytest.mark.parametrize("key", EFFECTS)
def test_key_has_an_effect(key, observe, known):
    wanted = EFFECTS[key]
    base = json.dumps(wanted.base)
    if base not in known:
        known[base] = observe(1, wanted.base)
    before = known[base]
    after = observe(2, wanted.base, wanted.changes)
    if wanted.seen != ("error",):
        assert before.get("error") is None
    if "error" not in wanted.seen:  # a refusal changes everything else
        assert after.get("error") is None
    for name in wanted.seen:
        assert before.get(name) != after.get(name), f"{key}: {name} does not change"
    if "loaded" in wanted.seen:  # config, tokenizer and weights alike
        assert all(old != new for old, new in zip(before["loaded"], after["loaded"], strict=True))


def test_a_key_without_an_effect_would_be_noticed(observe):
    """Two runs of one config show the same, so a difference is the key's."""
    before, after = observe(1, {}), observe(2, {})
    for name in (
        "metrics",
        "completions",
        "weights",
        "files",
        "attention_calls",
        "plan",
        "log",
        "loaded",
        "error",
        "log_file",
    ):
        assert before.get(name) == after.get(name), name
