"""check and eval on the quick start's model with random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import pgrpo
from pgrpo.admission.proof import Proof
from pgrpo.commands import check as check_module
from pgrpo.commands import plan as dry_run
from pgrpo.commands.check import check
from pgrpo.commands.evaluate import evaluate
from pgrpo.commands.plan import plan
from pgrpo.config import Config, ConfigError, load_config
from pgrpo.rollout.vllm import start as vllm_start

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model


def config(model: Path, folder: Path, *overrides: str) -> Config:
    return load_config("quickstart", [f"model.path={model}", f"run_dir={folder / 'run'}", *overrides])


def broken(build_batch):
    def build(groups, **kwargs):
        batch = build_batch(groups, **kwargs)
        return replace(batch, logit_index=(batch.logit_index - 1).clamp(min=0))

    return build


def test_check_passes_and_leaves_nothing(model, tmp_path, capsys):
    check(config(model, tmp_path))
    shown = capsys.readouterr().out
    assert "prompts of 6 to 6 tokens, median 6, mean 6, 95% at most 6\nover data.max_prompt_tokens=8: none" in shown
    assert shown.count("--- prompt (6 tokens)") == shown.count("--- completion (") == shown.count("--- reward ") == 4
    assert shown.count("(exact_match ") == 4
    assert "memory " in shown
    assert "grouped against the untouched model" in shown
    assert "repeated against the untouched model" in shown
    assert shown.endswith("all checks passed\n")
    assert not (tmp_path / "run").exists()


def test_a_dry_run_can_be_pasted_into_a_file(model, tmp_path, capsys):
    """Lines longer than a terminal, and what a terminal would show as a picture, come as they are."""
    template = ":smile: [bold] " + "{a}+{b}= " * 40
    dry = config(model, tmp_path, f"prompt.template='{template}'")
    plan(dry)
    shown, _, costs = capsys.readouterr().out.rpartition("\nmodel  ")
    (tmp_path / "again.yaml").write_text(shown)
    assert load_config(tmp_path / "again.yaml") == replace(dry, recipe=None)
    assert costs.count("\n") == 9


def test_a_dry_run_on_several_ranks_is_shown_once(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    shown = {}
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        plan(config(model, tmp_path))
        shown[rank] = capsys.readouterr().out
    assert (
        "on 2 rank(s)" in shown["0"]
        and "\nsampling      rollouts by the policy itself (there is no GPU)\n" in shown["0"]
    )
    assert shown["1"] == ""


def test_a_dry_run_plans_for_ranks_that_compute_together(model, tmp_path, capsys, monkeypatch):
    """Without torchrun for as many; on a machine without a GPU for one of 80 GB. Beside vLLM it says what a group takes."""
    monkeypatch.setattr(vllm_start, "is_installed", lambda: True)
    keys = ["model.dtype=bfloat16", "model.sequence_parallel_size=2", "rollout.engine=vllm"]
    plan(config(model, tmp_path, *keys))
    shown = capsys.readouterr().out
    assert "on 2 rank(s), 2 of which compute a micro-batch together" in shown
    assert "a step and 2 ranks, of at most" in shown
    assert "GiB a GPU, 2 of which share an engine; weights take 0.0, a group at its longest 0.0 of it" in shown
    assert "GiB of 79 (assumed) a rank" in shown
    assert "activation checkpointing: none; 2 of 2 stay gathered during an update\n" in shown
    plan(config(model, tmp_path, "model.dtype=float32"))  # on one rank, where FSDP2 shards nothing
    shown = capsys.readouterr().out
    assert "activation checkpointing: none\n" in shown
    with pytest.raises(
        ConfigError, match=r"_parallel_size: 4 does not divide 2 key/value heads; it may be 1, 2, as these"
    ):
        plan(config(model, tmp_path, *keys, "model.sequence_parallel_size=4"))
    plan(config(model, tmp_path, *keys, "rollout.tensor_parallel_size=2", "model.sequence_parallel_size=1"))
    assert "GiB a GPU, 2 of which share an engine" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"model.sequence_parallel_size: 2 does not divide the number of ranks, 3"):
        plan(config(model, tmp_path, *keys))


def test_a_dry_run_says_what_vllm_builds(model, tmp_path, capsys, monkeypatch):
    for name, answer in (("check_engine", None), ("check_pushable", None), ("check_built", "vLLM has code for it")):
        monkeypatch.setattr(dry_run, name, lambda *_, answer=answer: answer)
    plan(config(model, tmp_path, "rollout.engine=vllm"))
    assert "\nsampling      rollouts by vLLM (asked for); vLLM has code for it\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "proofs", "text"),
    [
        ((), {}, "up to 8 tokens that samples share are computed once for several micro-batches where that saves time"),
        (("train.token_budget=4096",), {}, None),
        (("model.sequence_parallel_size=2",), {}, "up to 8 tokens that samples share are computed once for several"),
        ((), {"policy": "layers attend twice"}, "none, as layers attend twice: a group that train.token_budget cuts"),
        (
            ("loss.teacher=teacher",),
            {"teacher": "layers attend twice"},
            "none, as of the teacher, layers attend twice: ",
        ),
    ],
)
def test_a_dry_run_says_whether_prefixes_are_kept(model, tmp_path, capsys, monkeypatch, changes, proofs, text):
    monkeypatch.setattr(
        dry_run, "check_model", lambda path, *_: Proof(not_kept=proofs.get(path.rpartition("/")[2], ""))
    )
    (tmp_path / "teacher").symlink_to(model)
    (tmp_path / "policy").symlink_to(model)
    keys = [key.replace("=teacher", f"={tmp_path}/teacher") for key in changes]
    plan(
        config(tmp_path / "policy", tmp_path, *(["train.token_budget=24"] if "budget" not in str(keys) else []), *keys)
    )
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kept prefixes ")]
    assert [line.partition("kept prefixes ")[2][: len(text or "")] for line in shown] == ([text] if text else [])


def test_a_dry_run_refuses_an_engine_that_cannot_run_here(model, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"rollout\.compare_experts: True has no effect on the embedded engine"):
        plan(config(model, tmp_path, "rollout.compare_experts=true", "rollout.engine=embedded"))
    assert capsys.readouterr().out == ""


def test_a_dry_run_shows_nothing_of_what_it_refuses(tmp_path, capsys):
    message = r"model.path=.*no-model: cannot load this model: .*[^.]; give a folder that from_pretrained loads, or a hub name$"
    with pytest.raises(ConfigError, match=message):
        plan(config(tmp_path / "no-model", tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("overlong", "counts"),
    [
        (
            "drop",
            "4 prompts of 2 to 8 tokens, median 4, mean 4, 95% at most 4\nover data.max_prompt_tokens=8: 2 (dropped)",
        ),
        (
            "truncate",
            "6 prompts of 2 to 8 tokens, median 6, mean 6, 95% at most 8\nover data.max_prompt_tokens=8: 2 (truncated)",
        ),
    ],
)
def test_check_counts_tokens_of_prompts(model, tmp_path, capsys, overlong, counts):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"a": "1" * n, "answer": "1"}) + "\n" for n in (1, 3, 3, 7, 8, 30)))
    overrides = [
        f"data.path={rows}",
        'prompt.template="{a}="',
        f"data.overlong={overlong}",
        "rollout.prompts_per_step=4",
    ]
    check(config(model, tmp_path, *overrides, "eval.every=0"))
    assert counts in capsys.readouterr().out


def test_check_warns_where_no_completion_has_a_reward(model, tmp_path, caplog):
    (tmp_path / "own.py").write_text("def f(completions, a, **_):\n    return [None] * len(completions)\n")
    check(config(model, tmp_path, f"rewards.functions=[{{function: '{tmp_path}/own.py:f'}}]"))
    assert "None of these completions has a reward" in caplog.text
    caplog.clear()
    check(config(model, tmp_path))
    assert "has a reward" not in caplog.text


def test_check_of_lora_says_what_is_trained(model, tmp_path, capsys):
    check(config(model, tmp_path, "model.lora_rank=4", "model.lora_targets=[q_proj]"))
    shown = capsys.readouterr().out
    assert "124,160 parameters, float32, frozen; LoRA trains 1,024 beside them" in shown
    assert shown.endswith("all checks passed\n")


def test_check_passes_when_every_completion_is_one_token(model, tmp_path):
    check(config(model, tmp_path, "rollout.max_completion_tokens=1"))


def test_check_notices_a_wrong_logit_index(model, tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "build_batch", broken(check_module.build_batch))
    with pytest.raises(RuntimeError, match=r"grouped attention is not exact on .*: log-probs differ by \d"):
        check(config(model, tmp_path))


def test_check_notices_that_it_proves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setitem(check_module.SEEDED_BUGS, "wrong row for the first token", lambda batch: batch)
    with pytest.raises(RuntimeError, match="did not detect a seeded bug: wrong row for the first token"):
        check(config(model, tmp_path))


REWARD = """
import json
def score(prompts, completions, answer, **_):
    with open({log!r}, "a") as file:
        for row in zip(prompts, completions, answer):
            file.write(json.dumps(row) + "\\n")
    return [float(c[:1] == "1") for c in completions]
"""


def test_eval_numbers(model, tmp_path, capsys):
    log = tmp_path / "scored.jsonl"
    (tmp_path / "reward.py").write_text(REWARD.format(log=str(log)))
    got = evaluate(
        config(
            model,
            tmp_path,
            "eval.every=0",
            "eval.rows=6",
            "eval.samples=4",
            f"rewards.functions=[{{function: '{tmp_path}/reward.py:score'}}]",
        )
    )
    scored = [json.loads(line) for line in log.read_text().splitlines()]
    by_prompt: dict[str, list[bool]] = {}
    assert len(scored) == 24 + 6  # the greedy ones come last
    for prompt, completion, _ in scored[:24]:
        by_prompt.setdefault(prompt, []).append(completion[:1] == "1")
    assert [len(flags) for flags in by_prompt.values()] == [4] * 6
    right = [sum(flags) for flags in by_prompt.values()]
    assert 0 < sum(right) < 24  # or this would test nothing
    assert got["eval/reward"] == pytest.approx(sum(right) / 24)
    assert got["eval/pass@1"] == pytest.approx(sum(right) / 24)
    assert got["eval/pass@4"] == pytest.approx(sum(n > 0 for n in right) / 6)
    shown = " ".join(capsys.readouterr().out.split())  # a narrow terminal wraps the title
    assert "6 prompts x 4" in shown
    assert "pass@4" in shown and "greedy" in shown and "95% confidence interval" in shown
    results = tmp_path / "run" / "eval" / "step_0"
    written = [json.loads(line) for line in (results / "samples.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["completion"], row["columns"]["answer"]) for row in written] == [
        tuple(s) for s in scored
    ]
    assert [row["mode"] for row in written] == ["sampled"] * 24 + ["greedy"] * 6
    assert got["eval/greedy/pass@1"] == sum(c[:1] == "1" for _, c, _ in scored[24:]) / 6
    summary = json.loads((results / "summary.json").read_text())
    assert summary["metrics"] == got
    assert (summary["prompts"], summary["samples"], summary["sampling"]["temperature"]) == (6, 4, 1.0)
    # The results are no reason not to begin the run there; anything else is.
    pgrpo.train("quickstart", [f"model.path={model}", f"run_dir={tmp_path / 'run'}", "train.steps=1", "eval.every=0"])
    with pytest.raises(ConfigError, match="not empty"):
        pgrpo.train(
            "quickstart", [f"model.path={model}", f"run_dir={tmp_path / 'run'}", "train.steps=1", "eval.every=0"]
        )


@pytest.mark.parametrize("rank", [0, 4])
def test_eval_of_a_checkpoint_is_what_training_logged(model, tmp_path, rank):
    (tmp_path / "own.py").write_text(
        "def first_digit(completions):\n    return [float(t[:1] == '1') for t in completions]\n"
    )
    keys = [
        f"model.lora_rank={rank}",
        "train.steps=2", "rollout.prompts_per_step=4", "optim.lr=0.05", "eval.every=2", "eval.rows=16", "eval.samples=2",
        "track.console=false", f"rewards.functions=[{{function: '{tmp_path}/own.py:first_digit'}}]",
    ]  # fmt: skip
    settings = config(model, tmp_path, *keys)
    pgrpo.train("quickstart", [f"model.path={model}", f"run_dir={tmp_path / 'run'}", *keys])
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = [{k: v for k, v in row.items() if k.startswith("eval/")} for row in (rows[0], rows[-1])]
    assert first != last
    assert evaluate(settings) == first
    assert evaluate(settings, "auto") == last
    assert evaluate(settings, str(tmp_path / "run" / "checkpoints" / "step_2")) == last


def judged(scores: list[float]):
    """A reward from Python: what evaluation n gives every held-out sum, and a spread for training."""
    calls = iter(scores)

    def reward(completions, split, **_):
        if split[0] == "train":
            return [float(i % 2) for i in range(len(completions))]
        value = next(calls)
        return [value] * len(completions)

    return reward


ROWS = """
def rows(split):
    return [{"a": a, "b": 11, "answer": "1", "split": split} for a in range(10, 20)]
"""


def test_the_best_checkpoint_is_kept_found_and_remembered_by_a_resumed_run(model, tmp_path):
    (tmp_path / "own.py").write_text(ROWS)
    run = tmp_path / "run"
    data = [f"data.path={tmp_path / 'own.py'}:rows", "data.eval_split=held_out", "rollout.prompts_per_step=4"]
    keys = [f"model.path={model}", f"run_dir={run}", *data, "rewards.functions=[]", "optim.lr=0.05"]
    keys += ["eval.every=1", "eval.rows=4", "eval.greedy=false", "track.console=false"]
    keys += ["checkpoint.keep=1", "checkpoint.keep_best=eval/reward"]
    # The model itself is best of all, but there is no checkpoint of it; of equal ones the first is kept.
    pgrpo.train("quickstart", [*keys, "train.steps=4"], rewards=[judged([0.9, 0.2, 0.6, 0.6, 0.3])])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_2", "step_4"]
    pgrpo.train("quickstart", [*keys, "train.steps=6"], rewards=[judged([0.5, 0.4])], resume="auto")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_2", "step_6"]
    logged = [json.loads(line)["eval/reward"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == pytest.approx([0.9, 0.2, 0.6, 0.6, 0.3, 0.5, 0.4])
    assert sorted(path.name for path in (run / "eval").iterdir()) == [f"step_{i}" for i in range(7)]
    found = config(model, tmp_path, *data, "eval.rows=4")
    assert evaluate(found, "best") == evaluate(found, str(run / "checkpoints" / "step_2")) != evaluate(found, "auto")
    # Going on from the best one sets later checkpoints and evaluations aside.
    pgrpo.train("quickstart", [*keys, "train.steps=3"], rewards=[judged([0.7])], resume="best")
    for folder in ("checkpoints", "eval"):
        names = {path.name for path in (run / folder).iterdir()}
        assert "abandoned_step_6" in names and "step_3" in names and not {"step_4", "step_6"} & names


def test_eval_takes_a_checkpoints_weights_alone(model, tmp_path):
    """With another seed and on other data than it was trained with; the loss's reference model is not loaded."""
    keys = [f"model.path={model}", f"run_dir={tmp_path / 'run'}", "train.steps=1", "eval.every=0", "optim.lr=0.05"]
    pgrpo.train("quickstart", keys, rewards=[lambda completions, **_: [float(len(c)) for c in completions]])
    (tmp_path / "own.py").write_text(ROWS)
    other = [f"data.path={tmp_path / 'own.py'}:rows", "data.eval_split=held_out", "seed=1", "loss.kl_coef=0.1"]
    other += ["rollout.prompts_per_step=4", "eval.rows=4"]
    trained = evaluate(config(model, tmp_path, *other), "auto")
    assert json.loads((tmp_path / "run" / "eval" / "step_1" / "summary.json").read_text())["seed"] == 1
    assert trained != evaluate(config(model, tmp_path, *other))


def test_check_and_eval_run_a_config_of_many_gpus_on_one_device(model, tmp_path, capsys):
    """Two copies of eight shards each, say; and what only a training's evaluations must have is not asked for."""
    many = config(
        model, tmp_path, "model.dtype=bfloat16", "model.fsdp_size=8", "model.sequence_parallel_size=2", "eval.rows=2"
    )
    metrics = evaluate(replace(many, checkpoint=replace(many.checkpoint, keep_best="eval/pass@64")))
    assert 0 <= metrics["eval/pass@1"] <= 1
    check(many)
    assert "on 1 rank(s)" in capsys.readouterr().out


def test_warnings_of_a_command_show_no_secret_and_steer_no_terminal(model, tmp_path, launch):
    (tmp_path / "own.py").write_text(
        "def judge(completions, api_key, **_):\n    raise ValueError(f'401 for {api_key} \\x1b[31mred')\n"
    )
    function = f"{{function: {tmp_path}/own.py:judge, args: {{api_key: '${{oc.env:MY_KEY}}'}}}}"
    keys = [f"model.path={model}", f"run_dir={tmp_path / 'run'}", "eval.rows=2", "rewards.on_error=mask"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_KEY", "sk-very-secret-0123456789")
        for command in ("eval", "check"):
            command_line = ["-m", "pgrpo", command, "--config", "quickstart", *keys, f"rewards.functions=[{function}]"]
            done = launch(command_line, 1)
            shown = done.stdout + done.stderr
            assert "401 for (redacted) \\x1b[31mred" in shown, shown
            assert "secret" not in shown and "\x1b[31m" not in shown


def test_eval_counts_rewards_that_fail(model, tmp_path, caplog):
    (tmp_path / "own.py").write_text(
        "import math\n"
        "def half(completions, answer, **_):\n"
        "    return [math.nan if i % 2 else 1.0 for i, _ in enumerate(completions)]\n"
    )
    keys = ["rewards.on_error=mask", f"rewards.functions=[{{function: {tmp_path}/own.py:half}}]"]
    metrics = evaluate(config(model, tmp_path, *keys, "eval.rows=4", "eval.samples=2"))
    assert metrics["eval/rewards/errors"] == 4 and metrics["eval/greedy/rewards/errors"] == 2
    assert metrics["eval/reward"] == 1
    assert (
        "evaluation: 4 completions left out, as a reward failed on them; the first error: reward `half`" in caplog.text
    )


def test_eval_refuses_what_is_not_there(model, tmp_path, monkeypatch):
    pgrpo.train("quickstart", [f"model.path={model}", f"run_dir={tmp_path / 'run'}", "train.steps=1", "eval.every=0"])
    monkeypatch.setattr("pgrpo.commands.evaluate.build", None)  # refused before the model is loaded
    with pytest.raises(ConfigError, match="has no checkpoint"):
        evaluate(replace(config(model, tmp_path), run_dir=str(tmp_path / "other")), "auto")
    with pytest.raises(ConfigError, match=r"has no best checkpoint; train with checkpoint\.keep_best=eval/reward"):
        evaluate(config(model, tmp_path), "best")
    with pytest.raises(ConfigError, match="no checkpoint at"):
        evaluate(config(model, tmp_path), str(tmp_path / "step_9"))
    with pytest.raises(ConfigError, match=r"^evaluation needs held-out rows: set data\.eval_path"):
        evaluate(config(model, tmp_path, "data.eval_split=null", "eval.every=0"))


def test_check_says_that_it_repeats_the_rows_of_a_small_data_set(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check_module, "_prove", lambda *_: None)
    (tmp_path / "two.jsonl").write_text('{"a": 1, "b": 2, "answer": "3"}\n{"a": 2, "b": 2, "answer": "4"}\n')
    check(config(model, tmp_path, f"data.path={tmp_path / 'two.jsonl'}", "eval.every=0", "rollout.prompts_per_step=2"))
    shown = capsys.readouterr().out
    assert "2 rows, repeated to 4 prompts\n--- prompt" in shown
    assert shown.count("--- prompt") == 4
