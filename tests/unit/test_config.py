"""load_config: what it merges, and everything that it refuses, with the message a user would read."""

from __future__ import annotations

import copy
import math
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from pgrpo.config import Config, ConfigError, LossConfig, check_world_size, find_file, load_config, packaged, to_yaml
from pgrpo.config.names import foreign
from pgrpo.config.presets import PRESETS
from pgrpo.config.rules import REDACTED, leaves
from pgrpo.config.source import valid_keys

BASE: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"path": "m"},
    "data": {"path": "d"},
    "prompt": {"template": "{q}"},
    "rewards": {"functions": [{"function": "exact_match"}]},
    "train": {"steps": 10},
}
LOADED = load_config(BASE)
YAML = """\
run_dir: runs/x
model: {path: m}
data: {path: d}
prompt: {template: "{q}"}
rewards: {functions: [{function: exact_match}]}
train: {steps: 10}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(source: Any, *overrides: str, **options: bool) -> str:
    with pytest.raises(ConfigError) as info:
        load_config(source, overrides, **options)
    return one_line(info.value)


def one_line(error: ConfigError) -> str:
    """One line; several only where several keys are unknown."""
    assert len(str(error).splitlines()) == 1 or "keys are not pgrpo's:" in error.args[0]
    return str(error)


def test_a_config_is_not_what_another_was_changed_to() -> None:
    for changed in (load_config(BASE, ["optim.lr=0.5", "rollout.stop=[a]"]), load_config(BASE)):
        changed.rewards.functions[0].args["column"] = "b"
        changed.rollout.stop.append("b")
        assert load_config(BASE) == LOADED


def test_a_very_long_value_hides_neither_the_key_nor_the_fix() -> None:
    message = refused(BASE, f"optim.schedule={'x' * 100_000}")
    assert message.startswith("override 'optim.schedule=xxx")
    assert message.endswith("x is not a choice; it may be constant, linear, cosine")
    assert len(message) < 1000


# --- merging


def test_each_source_goes_over_the_one_before(folder: Path) -> None:
    write(folder / "recipes/task.yaml", "data: {path: d, split: a, max_prompt_tokens: 9}\nrollout: {stop: [x, y]}\n")
    config = write(folder / "c.yaml", "recipe: task\n" + YAML.replace("{path: d}", "{split: b}"))
    loaded = load_config(config, ["data.max_prompt_tokens=7", "optim.lr=1e-6", "rewards.functions[0].weight=2"])
    assert (loaded.data.path, loaded.data.split, loaded.data.max_prompt_tokens) == ("d", "b", 7)
    assert loaded.rollout.stop == ["x", "y"]
    assert loaded.optim.lr == 1e-6
    assert loaded.rewards.functions[0].weight == 2.0
    assert loaded.optim.betas == (0.9, 0.999)  # a tuple, as the schema says
    assert loaded.rollout.group_size == 8  # the schema's default
    assert load_config(config, ["rollout={group_size: 4}"]).rollout.stop == ["x", "y"]  # a section is merged


def test_a_preset_stands_below_every_key_that_is_set(folder: Path) -> None:
    config = write(folder / "c.yaml", YAML + "loss: {preset: gspo, clip_high: 0.1}\n")
    loss = load_config(config).loss
    assert (loss.ratio, loss.aggregate, loss.clip_low, loss.clip_high) == ("sequence", "sample", 3e-4, 0.1)
    loss = load_config(config, ["loss.preset=cispo", "loss.aggregate=constant"]).loss
    assert (loss.ratio, loss.objective, loss.aggregate, loss.clip_low, loss.clip_high) == (
        "token", "cispo", "constant", 1.0, 0.1,
    )  # fmt: skip
    assert load_config(config, ["loss.preset=null"]).loss == LossConfig(clip_high=0.1)
    assert load_config(config, ["loss={preset: dapo}"]).loss.mask_overlong


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_printed_resolved_and_reads_back_the_same(preset: str, folder: Path) -> None:
    loaded = load_config(BASE, [f"loss.preset={preset}", "loss.clip_low=0.11"])
    assert PRESETS[preset].keys() == PRESETS["grpo"].keys() <= vars(LossConfig()).keys()
    for key, value in PRESETS[preset].items():
        assert getattr(loaded.loss, key) == (0.11 if key == "clip_low" else value)
    written = write(folder / "config.yaml", to_yaml(loaded))
    assert f"  aggregate: {PRESETS[preset]['aggregate']}\n" in written.read_text()
    assert load_config(written).loss == loaded.loss
    other = "dapo" if preset != "dapo" else "grpo"
    message = refused(written, f"loss.preset={other}")
    assert message.startswith(f"loss.preset: {other} changes nothing, {written} sets all of its keys; remove ratio, ")
    assert load_config(written, [f"loss.preset={preset}"]).loss == loaded.loss


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("loss.kl_estimator=k2", "loss.kl_coef is 0"),
        ("loss.ref_refresh_every=5", "loss.kl_coef is 0"),
        ("loss.ref_offload=cpu", "loss.kl_coef is 0"),
        ("loss.rollout_correction_cap=3", "loss.rollout_correction is none"),
        ("loss.rollout_correction_floor=0.5", "loss.rollout_correction is none"),
        ("model.lora_alpha=3", "model.lora_rank is 0"),
    ],
)
def test_a_key_that_would_have_no_effect_is_refused(override: str, needed: str) -> None:
    key, _, value = override.partition("=")
    message = refused(BASE, override)
    assert message.startswith(f"{key}: {value}")
    assert f"has no effect while {needed}; set {needed.split()[0]}, or leave it out" in message


def test_a_dual_clip_inside_of_the_clip_or_without_one_is_refused() -> None:
    for bound in ("1.1", "1.2"):
        message = refused(BASE, f"loss.clip_dual={bound}")
        assert message.startswith(f"loss.clip_dual: {bound} is not above 1 + loss.clip_high, 1.2, ")
    assert "1.28" in refused(BASE, "loss.clip_dual=1.25", "loss.preset=dapo")
    assert load_config(BASE, ["loss.clip_dual=1.21"]).loss.clip_dual == 1.21
    assert "no effect while loss.objective is cispo" in refused(BASE, "loss.clip_dual=9", "loss.preset=cispo")


def test_the_reference_of_lora_cannot_be_refreshed() -> None:
    message = refused(BASE, "loss.kl_coef=0.1", "loss.ref_offload=cpu", "model.lora_rank=2")
    assert message.startswith("loss.ref_offload: cpu has no effect with model.lora_rank 2: ")
    message = refused(BASE, "loss.kl_coef=0.1", "loss.ref_refresh_every=5", "model.lora_rank=2")
    assert message.startswith(
        "loss.ref_refresh_every: 5 has no effect with model.lora_rank 2: the reference is the frozen"
    )


def test_recipe_can_be_overridden(folder: Path) -> None:
    write(folder / "recipes/one.yaml", "data: {split: one}\n")
    write(folder / "recipes/two.yaml", "data: {split: two}\n")
    config = write(folder / "c.yaml", "recipe: one\n" + YAML)
    assert load_config(config).data.split == "one"
    assert load_config(config, ["recipe=two"]).data.split == "two"


def test_names_are_found_by_path_then_here_then_beside_then_packaged(folder: Path) -> None:
    assert find_file("configs", "quickstart") == packaged("configs") / "quickstart.yaml"
    here = write(folder / "configs/quickstart.yaml", YAML)
    assert find_file("configs", "quickstart.yaml").resolve() == here
    path = write(folder / "quickstart.yaml", YAML)
    assert find_file("configs", "quickstart").resolve() == path
    beside = write(folder / "elsewhere/task.yaml", "")
    assert find_file("recipes", "task", beside.parent) == beside
    recipe = write(folder / "recipes/task.yaml", "")
    assert find_file("recipes", "task", beside.parent) == recipe


def test_every_packaged_config_loads() -> None:
    for path in packaged("configs").glob("*.yaml"):
        assert load_config(path).train.steps > 0


def test_files_are_relative_to_the_yaml_that_names_them_then_to_the_current_folder(folder: Path) -> None:
    write(folder / "task/rows.py", "")
    write(folder / "task/score.py", "")
    held_out = write(folder / "held_out.jsonl", "")
    recipe = "data: {path: 'rows.py:rows', eval_path: held_out.jsonl}\n"
    recipe += "rewards: {functions: [{function: 'score.py:f'}, {function: 'module:f'}, {function: exact_match}]}\n"
    write(folder / "task/task.yaml", recipe)
    mapping = {**BASE, "recipe": "task/task.yaml", "data": {}, "rewards": {}}
    loaded = load_config(mapping)
    assert loaded.data.path == f"{folder}/task/rows.py:rows"
    assert loaded.data.eval_path == str(held_out)
    assert [f.function for f in loaded.rewards.functions] == [f"{folder}/task/score.py:f", "module:f", "exact_match"]
    message = refused({**mapping, "data": {"path": "none.py:rows"}})
    assert message.startswith("data.path: none.py:rows: no none.py beside")


def test_interpolation_and_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "12")
    monkeypatch.setenv("HOME", "/home/me")
    source = {**BASE, "run_dir": "~/runs/${now:%Y}-${seed}", "seed": 3, "train": {"steps": "${oc.env:STEPS}"}}
    loaded = load_config(source)
    assert re.fullmatch(r"/home/me/runs/20\d\d-3", loaded.run_dir)
    assert loaded.train.steps == 12
    assert "UNSET" in refused({**BASE, "model": {"path": "${oc.env:UNSET}"}})
    assert refused({**BASE, "model": {"path": "${nope}"}}).startswith("model.path: Interpolation key 'nope' not found")
    monkeypatch.setenv("STEPS", "many")
    assert re.match(r"train.steps: .*Value 'many' of type 'str' could not be converted to Integer", refused(source))
    monkeypatch.setenv("STEPS", "nan")
    assert "finite" in refused({**BASE, "optim": {"lr": "${oc.env:STEPS}"}})


def test_a_models_folder_is_absolute_and_a_hub_name_is_not_touched(tmp_path, monkeypatch) -> None:
    (tmp_path / "my" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load_config({**BASE, "model": {"path": "my/model"}}).model.path == str(tmp_path / "my" / "model")
    assert load_config({**BASE, "model": {"path": "my/other"}}).model.path == "my/other"


def test_a_literal_dollar_brace() -> None:
    template = r"cost: \${q}"
    loaded = load_config({**BASE, "prompt": {"template": template}})
    assert loaded.prompt.template == "cost: ${q}"
    assert "literal ${" in refused({**BASE, "prompt": {"template": "cost: ${q}"}})
    assert "literal ${" in refused({**BASE, "prompt": {"template": "cost: ${"}})


# --- to_yaml


def test_to_yaml_reads_back_without_its_recipe(folder: Path) -> None:
    write(folder / "recipes/task.yaml", "data: {split: '010'}\n")
    loaded = load_config({**BASE, "recipe": "task", "prompt": {"template": r"a \${q} {b}"}}, ["optim.lr=1e-6"])
    (folder / "recipes/task.yaml").unlink()
    again = load_config(write(folder / "resolved.yaml", to_yaml(loaded)))
    assert again == replace(loaded, recipe=None)
    assert again.data.split == "010"


@given(st.text(alphabet="${}\\ab:'\"\n#é", min_size=1))
@settings(max_examples=100, deadline=None)
def test_to_yaml_keeps_any_text(text: str) -> None:
    loaded = replace(LOADED, prompt=replace(LOADED.prompt, template=text))
    resolved = OmegaConf.create(to_yaml(loaded))
    assert OmegaConf.to_container(resolved, resolve=True)["prompt"]["template"] == text  # type: ignore[index]


def test_secrets_are_redacted(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("WHERE", "s3cret")
    functions = [{"function": "f", "args": {"url": "https://${oc.env:WHERE}@host", "api_key": "abc", "stop_tokens": 4}}]
    source = {**BASE, "rewards": {"functions": functions}, "model": {"path": "${data.path}"}}
    source["data"] = {"path": "${oc.env:WHERE}/x"}
    loaded = load_config(source)
    assert loaded.rewards.functions[0].args["url"] == "https://s3cret@host"
    assert loaded.model.path == "s3cret/x"
    text = to_yaml(loaded)
    assert "s3cret" not in text
    assert "abc" not in text
    assert text.count(REDACTED) == 4
    assert "stop_tokens: 4" in text
    assert "s3cret" not in to_yaml(copy.deepcopy(loaded))
    assert "s3cret" not in to_yaml(replace(loaded, seed=1))
    assert f"model.path: '{REDACTED}' was redacted" in refused(write(folder / "c.yaml", text), "data.path=d")


@pytest.mark.parametrize("name", ["KEY", "'KEY'", "${oc.env:NAME_OF}", "K${oc.env:REST}"])
def test_a_secret_in_a_key_of_another_type_is_in_no_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """However the variable is written; also where it is cut, and where its characters are escaped."""
    monkeypatch.setenv("KEY", 'sk-ab"c\\d\nsecond line')
    monkeypatch.setenv("NAME_OF", "KEY")
    monkeypatch.setenv("REST", "EY")
    for changed in (
        {"seed": f"${{oc.env:{name}}}"},
        {"prompt": {"messages": [{"role": f"${{oc.env:{name}}}", "content": "x"}]}},
    ):
        with pytest.raises(ConfigError) as refused:
            load_config({**BASE, **changed})
        shown = "".join(traceback.format_exception(refused.value))
        assert REDACTED in shown
        assert "sk-ab" not in shown and "second line" not in shown


# --- refusals: keys


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("rollout.group_sise", "did you mean rollout.group_size?"),
        ("group_size", "here it is rollout.group_size"),
        ("optim.grp_size", "did you mean rollout.group_size?"),
        ("num_generations", "here it is rollout.group_size"),
        ("actor_rollout_ref.rollout.n", "here it is rollout.group_size"),
        ("max_completion_length", "here it is rollout.max_completion_tokens"),
        ("beta", "here it is loss.kl_coef"),
        ("learning_rate", "here it is optim.lr"),
        ("epsilon", "here it is loss.clip_low"),
        ("epsilon_high", "here it is loss.clip_high"),
        ("num_iterations", "here it is train.epochs_per_step"),
        ("loss_type", "here it is loss.preset"),
        ("vllm_importance_sampling_cap", "here it is loss.rollout_correction_cap"),
        ("algorithm.filter_groups.enable", "here it is rollout.resample_limit"),
        ("train.per_device_train_batch_size", "here it is train.token_budget (micro"),
        ("model.name", "here it is model.path"),
        ("checkpoint.qqqq", "valid keys: checkpoint.every, checkpoint.keep, checkpoint.keep_best"),
        ("rewards.functions[0].wieght", "did you mean rewards.functions[i].weight?"),
        ("secret_keys", "did you mean environment.secrets"),
    ],
)
def test_unknown_key(key: str, hint: str, folder: Path) -> None:
    message = refused(BASE, f"{key}=1")
    assert message.startswith(f"override '{key}=1': no such key; {hint}")
    if "[" not in key:
        nested: Any = 1
        for part in reversed(key.split(".")):
            nested = {part: nested}
        message = refused({**BASE, **nested})
        assert "no such key; " in message


def test_unknown_key_has_a_line(folder: Path) -> None:
    config = write(folder / "c.yaml", YAML + "rollout:\n  # sizes\n  group_sise: 8\n")
    assert refused(config) == f"{config}:9: rollout.group_sise: no such key; did you mean rollout.group_size?"


def test_all_keys_of_another_trainer_are_answered_at_once(folder: Path) -> None:
    theirs = """\
data: {path: d, train_files: a.parquet}
actor_rollout_ref:
  model: {path: m}
  rollout: {n: 8}
  actor:
    kl_loss_coef: 0.001
trainer: {save_freq: 20, zzqq: 1}
frobnicate: {a: {b: 1}}
rewards: {functions: [{function: math, wieght: 2}]}
"""
    config = write(folder / "c.yaml", theirs)
    assert refused(config).splitlines() == [
        "8 keys are not pgrpo's:",
        f"  {config}:1: data.train_files: here it is data.path",
        f"  {config}:3: actor_rollout_ref.model.path: here it is model.path",
        f"  {config}:4: actor_rollout_ref.rollout.n: here it is rollout.group_size",
        f"  {config}:6: actor_rollout_ref.actor.kl_loss_coef: here it is loss.kl_coef",
        f"  {config}:7: trainer.save_freq: here it is checkpoint.every",
        f"  {config}:7: trainer.zzqq: there is no such key, and none that is near",
        f"  {config}:8: frobnicate: there is no such key, and none that is near",
        f"  {config}:9: rewards.functions[0].wieght: did you mean rewards.functions[i].weight?",
    ]
    actor = {"fsdp_config": {"optimizer_offload": True, "fsdp_size": -1}, "clip_ratio_c": 3.0}
    dapo = {"reward_manager": "dapo", "overlong_buffer": {"enable": True, "len": 4096}}
    said = refused({**BASE, "actor_rollout_ref": {"actor": actor}, "reward_model": dapo}).splitlines()
    assert said[1:4] == [
        "  actor_rollout_ref.actor.fsdp_config.optimizer_offload: here it is optim.offload",
        "  actor_rollout_ref.actor.fsdp_config.fsdp_size: here it is model.fsdp_size",
        "  actor_rollout_ref.actor.clip_ratio_c: here it is loss.clip_dual",
    ]
    assert said[5].startswith("  reward_model.overlong_buffer: DAPO's length penalty is the reward `soft_overlong`")
    assert len(said) == 6
    many = {f"key_{i}_{'x' * 90}": 1 for i in range(200)}  # and a long answer is not cut in the middle
    assert len(refused(many).splitlines()) == 201


@pytest.mark.parametrize("typo", ["rgs", "ARGS", "argsx", " args"])
def test_a_misspelt_section_is_one_fault_whatever_is_in_it(typo: str) -> None:
    function = {"function": "math", typo: {"max_tokens": 5, "n": 2}}  # both are verl's, elsewhere
    key = f"rewards.functions[0].{typo}"
    message = f"{key}: no such key; did you mean rewards.functions[i].args?"
    assert refused({**BASE, "rewards": {"functions": [function]}}) == message
    wrong = {"prompts_per_step": 4, "group_size": 2, "max_completion_length": 9}
    assert refused({**BASE, "rolout": wrong}) == "rolout: no such key; did you mean rollout?"
    assert refused({**BASE, "rolout": {"n": 2, "n_gpus_per_node": 4}}).startswith(
        "2 keys are not pgrpo's:\n  rolout.n: "
    )


@pytest.mark.parametrize("value", [1, None, ""], ids=repr)
def test_a_name_of_another_trainer_is_answered_in_every_section_whatever_its_value(value: Any) -> None:
    names = {name.rpartition(".")[2] for name in foreign()}
    for section in ("", "model", "data", "rollout", "loss", "optim"):
        theirs = [name for name in names if f"{section}.{name}".lstrip(".") not in valid_keys()]
        given = dict.fromkeys(theirs, value)
        message = refused({**BASE, **(given if not section else {section: given})})
        assert message.splitlines()[0] == f"{len(theirs)} keys are not pgrpo's:"
        for name in theirs:
            assert f"\n  {f'{section}.{name}'.lstrip('.')}: " in message


def test_names_of_other_trainers_lead_to_keys_that_exist() -> None:
    for ours in foreign().values():
        for key in re.findall(r"[a-z_]+(?:\.[a-z_]+)+|run_dir", ours.partition(" (")[0]):
            assert key in valid_keys()
    assert not {key for key in foreign() if key in valid_keys()}


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("max_epochs", "here it is train.epochs_per_step"),
        ("packing_samples", "here it is train.token_budget (micro"),
        ("remote_rm_url", "here it is rewards.functions"),
        ("overlong_buffer_len", "here it is rewards.functions (the reward `soft_overlong`"),
        ("zero_stage", "leave it out: every rank of `torchrun`"),
        ("vllm_num_engines", "leave it out: every rank of `torchrun`"),
        ("dynamic_filtering_reward_range", "groups whose rewards are all equal"),
    ],
)
def test_names_of_openrlhf_are_not_taken_for_misspelt_ones_of_ours(key: str, answer: str) -> None:
    assert refused({**BASE, key: 1}).startswith(f"{key}: no such key; {answer}")


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("rewards.functions=math", "rewards.functions: math is text, not a list; write [{function: math}]"),
        ("rewards.functions=[math]", "rewards.functions[0]: math is text, not a mapping; write {function: math}"),
        ("rollout.stop=END", "rollout.stop: END is text, not a list; write [END]"),
        ("+optim.lr=1", "write key=value (key=null for none), without Hydra's + or ~, such as rollout.group_size=8"),
    ],
)
def test_the_fix_is_what_to_write(override: str, fix: str) -> None:
    assert refused(BASE, override) == f"override '{override}': {fix}"


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("run_dir: x\n\tseed: 1\n", "indent with spaces"),
        ("data: {path: a\n", "close what is open"),
        ("run_dir: a: b\n", "quote text"),
    ],
)
def test_what_is_no_yaml_is_told_how_to_mend_it(folder: Path, text: str, fix: str) -> None:
    assert refused(write(folder / "c.yaml", text)).endswith(f"; {fix}")


def test_duplicate_key(folder: Path) -> None:
    config = write(folder / "c.yaml", YAML + "loss:\n  clip_low: 0.1\n  clip_high: 0.2\n  clip_low: 0.3\n")
    assert refused(config) == f"{config}:10: loss.clip_low: duplicate key, first on line 8; remove one of them"
    assert "loss.clip_low: duplicate key" in refused(BASE, "loss={clip_low: 1, clip_low: 2}")


def test_missing_values() -> None:
    message = refused({})
    assert message.startswith("data.path, model.path, run_dir, train.steps: no value;")
    assert message.endswith("such as data.path=VALUE")
    assert refused({**BASE, "model": {"path": "???"}}).startswith("model.path: no value;")
    without = {key: value for key, value in BASE.items() if key not in ("data", "rewards")}
    assert refused(without, rewards_from_python=True).startswith("data.path: no value")
    assert refused(without, data_from_python=True).startswith("rewards.functions: []")
    assert load_config(without, rewards_from_python=True, data_from_python=True).rewards.functions == []


# --- refusals: values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_size=eight", "eight is text, not a whole number; write a whole number"),
        ("rollout.group_size='8'", "8 is text, not a whole number; write it without quotes: 8"),
        ("rollout.group_size=8.5", "8.5 is a number, not a whole number"),
        ("rollout.group_size=true", "true is true or false, not a whole number"),
        ("rollout.group_size=null", "null is not a value here; give a whole number"),
        ("rollout.group_size=010", "010 reads as the number 8; write rollout.group_size: 8 if that is meant"),
        ("rollout.group_size=[8]", "[8] is a list, not a whole number"),
        ("optim.lr=true", "true is true or false, not a number"),
        ("optim.lr=abc", "abc is text, not a number"),
        ("data.shuffle=1", "1 is a whole number, not true or false"),
        ("optim.betas=[0.9]", "[0.9] has 1 items; give 2"),
        ("optim.betas=0.9", "0.9 is a number, not a list"),
        ("rollout.stop=abc", "abc is text, not a list"),
        ("loss=1", "1 is a whole number, not a mapping"),
        ("prompt.template={q}", "{'q': None} is a mapping, not text; put the text in quotes"),
        ("loss.aggregate=tokens", "tokens is not a choice; it may be token, sample, constant"),
        ("data.overlong=no", "no is not a choice; it may be error, drop, truncate"),
        ("prompt.messages=[{role: bot, content: x}]", "bot is not a choice; it may be system, user, assistant"),
        ("data.revision=010", """010 reads as 8, a whole number, not text; quote it: 'data.revision="010"'"""),
        ("data.revision=0123456", "0123456 reads as 42798, a whole number, not text"),
        ("data.split=no", """no reads as False, true or false, not text; quote it: 'data.split="no"'"""),
        ("data.split=1e3", "1e3 reads as 1000.0, a number, not text"),
        ("rollout.stop=[a, 010]", "010 reads as 8, a whole number, not text"),
        ("rewards.functions[0].args={1: 2}", "its key 1 is a whole number, not text; put the key in quotes"),
        ("rewards.functions[4].weight=1.0", ""),
    ],
)
def test_wrong_type(override: str, message: str) -> None:
    error = refused(BASE, override)
    assert message in error
    assert override.partition("=")[0].partition("[")[0] in error


def test_scalar_trap_in_a_file(folder: Path) -> None:
    config = write(folder / "c.yaml", YAML + "loss:\n  kl_coef: 0.1\n" + "recipe: 0123456\n")
    expected = f'{config}:9: recipe: 0123456 reads as 42798, a whole number, not text; quote it: recipe: "0123456"'
    assert refused(config) == expected
    assert load_config(write(folder / "d.yaml", YAML), ["data.revision='010'"]).data.revision == "010"


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", ["optim.lr", "rewards.functions[0].weight", "prompt.chat_template_kwargs.x"])
def test_non_finite_number(key: str, number: str) -> None:
    base = {**BASE, "prompt": {"messages": [{"role": "user", "content": "{q}"}]}}
    message = refused(base, f"{key}={number}")
    assert message.endswith(f": {key}: {number} is not a finite number; give a finite one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "the file holds a list, not a mapping"),
        ("", "the file holds nothing, not a mapping"),
        ("just text", "the file holds text, not a mapping"),
        (
            "a: !!python/object/apply:os.system [echo]\n",
            "c.yaml:1: tag '!!python/object/apply:os.system' is not supported",
        ),
        ("a: !!python/name:os.system\n", "tag '!!python/name:os.system'"),
        ("a: &x 1\nb: *x\n", "c.yaml:1: anchor 'x' is not supported"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2: not YAML: but found another document"),
        ("a: [1\n", "c.yaml:2: not YAML"),
        ("a: b: c\n", "c.yaml:1: not YAML: mapping values are not allowed here"),
        ("[a]: 1\n", "c.yaml:1: a key is sequence, not text"),
        ("on: 1\n", "True: no such key"),
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
    ],
)
def test_bad_yaml(text: str, message: str, folder: Path) -> None:
    assert message in refused(write(folder / "c.yaml", text))


def test_what_would_take_too_long_or_too_much_memory_is_refused_at_once(folder: Path) -> None:
    started = time.process_time()
    nested = write(folder / "nested.yaml", "a: " + "[" * 100_000)
    assert refused(nested) == f"{nested}:1: nested too deeply; remove some brackets"
    assert "nested too deeply" in refused(BASE, "rollout.stop=" + "{a: " * 20_000)
    many = write(folder / "many.yaml", YAML + f"rollout: {{stop: [{'x, ' * 10_000}]}}\n")
    assert refused(many).startswith(f"{many}:7: more than 10000 keys and values; move data into the data set")
    assert "longer than 262144 characters" in refused(BASE, f"prompt.template={'x' * 300_000}")
    laugh = ["a0: &a0 [x, x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
    assert "anchor 'a0' is not supported" in refused(write(folder / "laugh.yaml", "\n".join(laugh)))
    deep: Any = 1
    for _ in range(50_000):
        deep = [deep]
    assert refused({**BASE, "rollout": {"stop": deep}}).startswith("config: nested too deeply; ")
    assert time.process_time() - started < 3


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ("x", "${{.a{0}}}${{.a{0}}}"),
        ("", "${{.a{0}}}${{.a{0}}}"),  # resolves to nothing, and would take as long
        ("x", "${{prompt.chat_template_kwargs.a{0}}}${{oc.env:NOT_SET,${{.a{0}}}}}"),
        ("${oc.env:PGRPO_LONG}", "${{.a{0}}}${{.a{0}}}"),
        ({"x": "y"}, {"x": "${{..a{0}.x}}", "y": "${{..a{0}}}"}),
    ],
)
def test_interpolations_that_grow_are_refused_at_once(first: Any, others: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGRPO_LONG", "x" * 1000)
    form = (lambda i: {k: v.format(i) for k, v in others.items()}) if isinstance(others, dict) else others.format
    arguments = {"a0": first} | {f"a{i}": form(i - 1) for i in range(1, 60)}
    prompt = {"messages": [{"role": "user", "content": "{q}"}], "chat_template_kwargs": arguments}
    started = time.process_time()
    message = refused({**BASE, "prompt": prompt})
    assert re.match(
        r"prompt\.chat_template_kwargs\.a\d+.*: with every \$\{\.\.\.\} resolved it has more than 1048576 characters",
        message,
    )
    overrides = [f"prompt.chat_template_kwargs.{key}={value}" for key, value in arguments.items()]
    if isinstance(others, str) and first:
        chat = {"messages": prompt["messages"]}
        assert "more than 1048576 characters" in refused({**BASE, "prompt": chat}, *overrides)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("text", ["${oc.create:a}", "${oc.decode:a}", "${a${seed}}", "${oc.select:seed}", "${nope:1}"])
def test_interpolations_whose_size_cannot_be_told_are_refused(text: str) -> None:
    message = refused(BASE, f"prompt.template={text}")
    assert (
        "is not supported, only ${key}, ${oc.env:NAME} and ${now:FORMAT}; correct it, or write \\${ for a literal"
        in message
    )


def test_interpolations_that_stay_small_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGRPO_A", "a${seed}")
    kwargs = {
        "a": "${oc.env:PGRPO_A}", "b": "${.a}${.a}", "c": "${oc.env:PGRPO_NONE,${seed}}", "d": "${rewards.functions[0].function}",
        "e": r"\${nope:x} ${now:%Y}", "f": {"g": "${..b}"}, "h": "${.f}",
    }  # fmt: skip
    prompt = {"messages": [{"role": "user", "content": "{q}"}], "chat_template_kwargs": kwargs}
    got = load_config({**BASE, "prompt": prompt}).prompt.chat_template_kwargs
    assert got["b"] == "a${seed}a${seed}"
    assert (str(got["c"]), got["d"], got["h"]) == ("0", "exact_match", {"g": got["b"]})
    assert re.fullmatch(r"\$\{nope:x\} 20\d\d", got["e"])


def test_unreadable_file(folder: Path) -> None:
    (folder / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as UTF-8 text" in refused(folder / "c.yaml")


def test_file_that_does_not_exist(folder: Path) -> None:
    write(folder / "configs/mine.yaml", YAML)
    message = refused("quickstrat.yaml")
    assert message.startswith(
        "config 'quickstrat.yaml': no such file; did you mean quickstart? give a path, or one of: "
    )
    assert "mine" in message
    assert "quickstart" in message
    assert refused({**BASE, "recipe": "nope"}).startswith("recipe 'nope': no such file; give a path, or one of: ")


@pytest.mark.parametrize(
    "override", ["seed", "seed 1", "=1", "seed=", "+seed=1", "~seed", "a..b=1", ".seed=1", "a b=1"]
)
def test_bad_override(override: str) -> None:
    assert refused(BASE, override).startswith(f"override {override!r}: write key=value")


def test_recipe_sections(folder: Path) -> None:
    recipe = write(folder / "r.yaml", "data: {split: x}\noptim:\n  lr: 1.0\n")
    source = {**BASE, "recipe": "r.yaml"}
    assert refused(source).startswith("r.yaml:2: optim: a recipe may set only data, prompt, rollout, rewards")
    recipe.write_text("rollout:\n  top_k: 5\n  group_size: 4\n")
    assert refused(source).startswith("r.yaml:3: rollout.group_size: a recipe may set only max_completion_tokens")
    recipe.write_text("rollout:\n  top_k: 5\n")
    assert load_config(source).rollout.top_k == 5


# --- refusals: ranges and combinations


def numbers(schema: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Dotted name, type and range of every field of the schema that holds a number."""
    types = get_type_hints(schema)
    for item in fields(schema):
        hint = types[item.name]
        if is_dataclass(inner := (get_args(hint) or (hint,))[0]):
            yield from numbers(inner, f"{prefix}{item.name}{'[0]' if get_args(hint) else ''}.")
        elif {int, float} & {hint, *get_args(hint)}:
            yield f"{prefix}{item.name}", hint, item.metadata


NUMBERS = {key: (hint, metadata) for key, hint, metadata in numbers()}


def test_the_walk_finds_every_number() -> None:
    found = {key.partition("[")[0] for key, value in leaves(load_config(BASE)) if type(value) in (int, float)}
    found |= {
        "data.image.max_pixels",
        "data.image.min_pixels",
        "environment.max_episode_tokens",
        "eval.temperature",
        "loss.clip_dual",
        "loss.off_policy_threshold",
        "loss.rollout_correction_floor",
        "model.fsdp_size",
        "model.max_positions",
        "model.mlp_chunks",
        "rollout.gpu_memory_utilization",
        "train.target_reward",
    }  # None unless set
    assert found == {key.partition("[")[0] for key in NUMBERS}
    assert {"rewards.functions[0].weight", "rewards.functions[0].timeout_s", "optim.betas"} <= NUMBERS.keys()


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_a_largest_value_and_floats_are_finite(key: str) -> None:
    hint, metadata = NUMBERS[key]
    value = "[0.9, {}]" if key == "optim.betas" else "{}"
    for text in ("1" + "0" * 20, "9" * 400, *([] if hint is int else ["1.0e+20", ".inf", "-.inf", ".nan"])):
        message = refused(BASE, f"{key}={value.format(text)}")
        assert key in message
        assert re.search(
            "too large; it must be at most|out of range|not a finite number|not a (whole )?number", message
        )
    if key != "optim.betas":
        assert math.isfinite(metadata["most"])
        value = 10**20 if int in (hint, *get_args(hint)) else 1e20
        most = f"it must be at most {metadata['most']:.0f}"
        assert refused(BASE, f"{key}=1{'0' * 20}") == f"{key}: {value} is too large; {most}"


@pytest.mark.parametrize("key", [key for key, (_, m) in NUMBERS.items() if m.get("least") is not None])
def test_at_least(key: str) -> None:
    least = NUMBERS[key][1]["least"]
    message = refused(BASE, f"{key}={least - 1}")
    assert message.startswith(f"{key}: {least - 1}")
    assert f"must be at least {least:.0f}" in message


@pytest.mark.parametrize("key", [key for key, (_, m) in NUMBERS.items() if m.get("above") is not None])
def test_a_number_at_its_excluded_bound_is_refused(key: str) -> None:
    above = NUMBERS[key][1]["above"]
    assert above == (1 if key == "loss.clip_dual" else 0)
    assert f"it must be above {above}" in refused(BASE, f"{key}={above}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.top_p=1.5"], "rollout.top_p: 1.5 is too large; it must be at most 1"),
        (["optim.betas=[0.9, 1.0]"], "optim.betas[1]: 1.0 is out of range"),
        (
            ["rollout.prompts_per_step=2048", "rollout.group_size=1024"],
            "rollout.group_size: rollout.prompts_per_step x rollout.group_size is 2048 x 1024 = 2097152 completions at once; "
            "lower one of them, the product must be at most 1048576",
        ),
        (["eval.rows=1000000", "eval.samples=17"], "eval.samples: eval.rows x eval.samples is 1000000 x 17 = 17000000"),
        (
            ["optim.betas=[0.9, .nan]"],
            "override 'optim.betas=[0.9, .nan]': optim.betas[1]: .nan is not a finite number",
        ),
        (["rewards.functions[0].timeout_s=0"], "rewards.functions[0].timeout_s: 0.0 is too small"),
        (["optim.betas=[-0.1, 0.9]"], "optim.betas[0]: -0.1 is out of range"),
        (["model.path=''"], "model.path: '' is empty"),
        (["rollout.stop=['']"], "rollout.stop[0]: '' is empty"),
        (
            ["train.updates_per_step=3"],
            "train.updates_per_step: 3 does not divide rollout.prompts_per_step, 32 prompts; "
            "it may be 1, 2, 4, 8, 16, 32, or set rollout.prompts_per_step to 27, 30, 33, 36",
        ),
        (
            ["train.token_budget=1279"],
            "train.token_budget: 1279 is less than the longest sample, 1280 tokens (data.max_prompt_tokens 1024 +"
            " rollout.max_completion_tokens 256); set train.token_budget to at least 1280",
        ),
        (
            ["model.activation_checkpointing=none", "model.mlp_chunks=4"],
            "model.mlp_chunks: 4 has no effect with model.activation_checkpointing none, which keeps all of the MLP; set it to ",
        ),
        (
            ["model.activation_checkpointing=matmuls", "model.mlp_chunks=2"],
            "model.mlp_chunks: 2 has no effect with model.activation_checkpointing matmuls, which keeps all of the MLP; set it to ",
        ),
        (
            ["model.activation_checkpointing=matmuls", "model.lora_rank=8"],
            "model.activation_checkpointing: matmuls keeps the products of a matrix and of its adapter (model.lora_rank 8), which",
        ),
        (
            ["optim.schedule=cosine", "optim.warmup_steps=10"],
            "optim.warmup_steps: 10 leaves no step of 10 for the cosine",
        ),
        (["prompt.template=null"], "prompt: nothing is set; give exactly one of prompt.template, prompt.messages"),
        (["prompt.messages_column=m"], "prompt: prompt.template and prompt.messages_column are set; give exactly one"),
        (["prompt.chat_template_kwargs={a: 1}"], "prompt.chat_template_kwargs: {'a': 1} has no effect"),
        (["rewards.functions=[]"], "rewards.functions: [] scores nothing; name at least one"),
        (["model.lora_alpha=8"], "model.lora_alpha: 8.0 has no effect while model.lora_rank is 0; set model.lora_rank"),
        (["model.lora_targets=[q_proj]"], "model.lora_targets: ['q_proj'] has no effect while model.lora_rank is 0"),
        (["model.lora_rank=8", "model.lora_targets=['']"], "model.lora_targets[0]: '' is empty"),
        (["eval.every=5"], "eval.every: 5 needs held-out rows; set data.eval_path or data.eval_split"),
    ],
)
def test_combinations(overrides: list[str], message: str) -> None:
    assert refused(BASE, *overrides).startswith(message)


def test_limits_themselves_are_allowed() -> None:
    overrides = [
        "train.token_budget=1280",
        "rollout.top_p=1",
        "eval.every=5",
        "data.eval_split=test",
        "eval.temperature=0",
    ]
    loaded = load_config(BASE, [*overrides, "optim.betas=[0, 0.999]", "optim.lr=0", "train.updates_per_step=32"])
    assert (loaded.train.token_budget, loaded.optim.betas) == (1280, (0.0, 0.999))


def test_world_size() -> None:
    loaded = load_config(BASE, ["rollout.prompts_per_step=32"])
    check_world_size(loaded, 8)
    with pytest.raises(
        ConfigError, match=r"32 prompts do not divide over 6 ranks; valid numbers of prompts: 24, 30, 36, 42"
    ):
        check_world_size(loaded, 6)
    loaded = load_config(BASE, ["rollout.prompts_per_step=32", "model.fsdp_size=4"])
    check_world_size(loaded, 8)
    with pytest.raises(
        ConfigError, match=r"model.fsdp_size: 4 does not divide the number of ranks, 2; valid: 1, 2, or"
    ):
        check_world_size(loaded, 2)
    together = load_config(BASE, ["rollout.prompts_per_step=2", "model.fsdp_size=4", "model.sequence_parallel_size=2"])
    check_world_size(together, 4)
    with pytest.raises(
        ConfigError, match=r"2 prompts do not divide over 4 shares of 2 ranks each .*numbers of prompts: 4, 8"
    ):
        check_world_size(together, 8)
    with pytest.raises(
        ConfigError, match=r"sequence_parallel_size: 2 does not divide the number of ranks, 3; valid: 1, 3, or"
    ):
        check_world_size(together, 3)


# --- fuzz

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from([key for key in valid_keys() if "[" not in key]), values)
@settings(max_examples=300, deadline=None)
def test_any_value_is_refused_in_one_line_or_fits_the_schema(key: str, value: Any) -> None:
    source = copy.deepcopy(BASE)
    *sections, last = key.split(".")
    target = source
    for section in sections:
        target = target.setdefault(section, {})
    target[last] = value
    try:
        loaded: Any = load_config(source)
    except ConfigError as error:
        one_line(error)
        return
    hints = get_type_hints(Config)
    for section in sections:
        loaded, hints = getattr(loaded, section), get_type_hints(hints[section])
    result = getattr(loaded, last)
    if isinstance(result, float):
        assert math.isfinite(result)
        assert result == value
    elif hints[last] in (int, str, bool):
        assert type(result) is hints[last]


@given(st.text(alphabet="ab.=[]{}:,'\"!&*#%0 1-\n${}é", max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    for attempt in (f"run_dir={text}", text):
        try:
            load_config(BASE, [attempt])
        except ConfigError as error:
            one_line(error)
