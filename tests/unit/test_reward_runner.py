"""RewardRunner: what functions get, how values add up, and that no failure becomes a silent zero."""

import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from making import episode, group

from pgrpo.config import ConfigError, RewardConfig
from pgrpo.rewards import RewardError, RewardRunner
from pgrpo.types import Group, Prompt

REPOSITORY = Path(__file__).parents[2]
MODULE = """
import asyncio, os, time
calls = 0
def length(completions): return [len(c) for c in completions]
def count(completions):
    global calls
    calls += 1
    return [calls] * len(completions)
def hang(completions): time.sleep(60)
def die(completions): os._exit(3)
def leave(completions): raise SystemExit
def divide(completions): return [1 / len(c) for c in completions]
async def slow(completions):
    await asyncio.sleep(0.01)
    return [2.0 for _ in completions]
class Keeps:
    total = 0
    def __call__(self, completions):
        self.total += len(completions)
        return [self.total] * len(completions)
"""


def groups(*texts: list[str], messages: Any = None, **columns: Any) -> list[Group]:
    """One group a list of completion texts; row numbers from 10."""
    out = []
    for i, completions in enumerate(texts):
        prompt = Prompt(10 + i, f"prompt {i}", [1], {"answer": f"{i}"} | columns, messages)
        out.append(group(prompt, *(episode([7, 8], logprobs=[-1.0, -1.0], text=t) for t in completions)))
    return out


def parts(group: Group) -> dict[str, list[float | None]]:
    return {name: group.reward_part(name) for name in group.episodes[0].reward_parts}


def runner(*functions: Callable | RewardConfig, on_error: Any = "raise") -> RewardRunner:
    configs = [f for f in functions if isinstance(f, RewardConfig)]
    return RewardRunner(configs, on_error=on_error, extra=[f for f in functions if not isinstance(f, RewardConfig)])


def score(function: Callable | RewardConfig, *texts: list[str], on_error: Any = "raise") -> list[Any]:
    with runner(function, on_error=on_error) as rewards:
        scored = groups(*texts)
        rewards.score(scored)
    return [group.rewards for group in scored]


@pytest.fixture
def module(tmp_path: Path) -> Callable[..., RewardConfig]:
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return lambda name, **keys: RewardConfig(f"{path}:{name}", **keys)


# What a function gets


def test_arguments_follow_the_signature():
    seen: dict[str, Any] = {}

    def named(completions, prompts, answer, finish_reasons, messages=None):
        seen["named"] = (completions, prompts, answer, finish_reasons, messages)
        return [0.0] * 3

    def everything(**columns):
        seen["everything"] = columns
        return [0.0] * 3

    chat = [{"role": "user", "content": "hi"}]
    with runner(named, everything) as rewards:
        rewards.score(groups(["a", "b"], ["c"], messages=chat, difficulty=3))
    texts = (["a", "b", "c"], ["prompt 0", "prompt 0", "prompt 1"], ["0", "0", "1"], ["stop"] * 3)
    assert seen["named"] == (*texts, [chat] * 3)
    assert seen["everything"] == {
        "completions": texts[0],
        "prompts": texts[1],
        "answer": texts[2],
        "finish_reasons": texts[3],
        "completion_ids": [[7, 8]] * 3,
        "messages": [chat] * 3,
        "difficulty": [3] * 3,
    }


def test_results_of_every_kind_are_numbers():
    for result in ([True, 2], (1, 2), np.array([1, 2]), torch.tensor([1.0, 2.0]), [np.float32(1), torch.tensor(2)]):
        assert score(lambda completions, result=result: result, ["a", "b"]) == [[1.0, 2.0]]
    assert score(lambda completions: (float(len(c)) for c in completions), ["a", "bcd"]) == [[1.0, 3.0]]


def test_async_functions_share_a_loop():
    import asyncio

    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def inside_a_loop(rewards):
        rewards.score(groups(["a"]))

    with runner(reward) as rewards:
        rewards.score(groups(["a"]))
        asyncio.run(inside_a_loop(rewards))
    assert len(loops) == 2
    assert loops[0] is loops[1]


# What runs at once


def test_async_functions_overlap():
    """Each waits for the other to begin: one after the other would never end."""
    import asyncio

    began: dict[str, asyncio.Event] = {}

    def make(name: str, other: str) -> Callable:
        async def reward(completions):
            began.setdefault(name, asyncio.Event()).set()
            await asyncio.wait_for(began.setdefault(other, asyncio.Event()).wait(), 10)
            return [1.0] * len(completions)

        return reward

    with runner(make("a", "b"), make("b", "a"), lambda completions: [1.0]) as rewards:
        scored = groups(["x"])
        rewards.score(scored)
    assert scored[0].rewards == [3.0]


def test_async_calls_inside_one_function_overlap():
    import asyncio

    async def reward(completions):
        async def one(text):
            await asyncio.sleep(0.2)
            return float(len(text))

        return await asyncio.gather(*map(one, completions))

    begin = time.monotonic()
    assert score(reward, ["a", "bb", "ccc"] * 10) == [[1.0, 2.0, 3.0] * 10]
    assert time.monotonic() - begin < 2


def test_an_async_function_that_fails_shows_the_sample():
    async def reward(completions):
        return [1.0 / len(c) for c in completions]

    with pytest.raises(
        RewardError, match=r"`reward` \(rewards\[0\]\) failed on a completion of row 10: it raised ZeroDivisionError"
    ):
        score(reward, ["a", ""])


@pytest.mark.timeout(60)
def test_functions_of_several_files_run_at_once_and_those_of_one_share_it(tmp_path: Path):
    source = (
        "import os, time\ndef {0}(completions):\n    time.sleep(0.7)\n    return [os.getpid()] * len(completions)\n"
    )
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(source.format(name) + source.format(f"{name}_too"))
    names = ["one", "two", "one_too"]
    with runner(*(RewardConfig(f"{tmp_path}/{name[:3]}.py:{name}") for name in names)) as rewards:
        rewards.score(groups(["a"]))  # starts the processes
        begin = time.monotonic()
        scored = groups(["a"])
        rewards.score(scored)
        took = time.monotonic() - begin
    one, two, one_too = (scored[0].reward_part(name)[0] for name in names)
    assert one == one_too != two
    assert 1.4 <= took < 2.0  # one after the other: 2.1


def test_functions_from_python_stay_in_their_thread_and_in_order():
    order: list[tuple[str, bool]] = []

    def make(name: str) -> Callable:
        def reward(completions):
            order.append((name, threading.current_thread() is threading.main_thread()))
            return [0.0] * len(completions)

        return reward

    score_of = [RewardConfig("exact_match"), make("a"), make("b"), RewardConfig("contains_answer")]
    with runner(*score_of) as rewards:
        rewards.score(groups(["a"]))
    assert order == [("a", True), ("b", True)]


def test_of_several_failures_the_first_function_is_shown():
    def late(completions):
        raise ValueError("late")

    async def early(completions):
        raise ValueError("early")

    for functions, name in (((late, early), "late"), ((early, late), "early")):
        with runner(*functions) as rewards, pytest.raises(RewardError, match=rf"reward `{name}` \(.*\) failed"):
            rewards.score(groups(["a"]))


# How values add up


def test_weights_none_and_names(module: Callable[..., RewardConfig]):
    def some(completions):
        return [None if c == "none" else 1.0 for c in completions]

    with runner(
        RewardConfig("exact_match", weight=2.0),
        RewardConfig("exact_match", args={"column": "other"}),
        module("length", weight=0.1),
        some,
    ) as rewards:
        assert rewards.names == ["exact_match", "exact_match_2", "length", "some"]
        scored = groups(["0", "none"], ["none"], other="none")
        report = rewards.score(scored)
    assert (report.errors, report.first_error) == (0, None)
    assert parts(scored[0]) == {
        "exact_match": [1.0, 0.0],
        "exact_match_2": [0.0, 1.0],
        "length": [1.0, 4.0],
        "some": [1.0, None],
    }
    assert scored[0].rewards == pytest.approx([2 + 0.1 + 1, 1 + 0.4], abs=1e-12)
    assert scored[1].rewards == pytest.approx([1.4], abs=1e-12)


def test_a_sample_is_none_only_where_every_reward_is():
    def a(completions):
        return [None, None, 0.0]

    def b(completions):
        return [None, 1.0, None]

    with runner(a, b) as rewards:
        scored = groups(["x", "y", "z"])
        assert rewards.score(scored).errors == 0
    assert scored[0].rewards == [None, 1.0, 0.0]


def test_no_completions():
    with runner(lambda completions: []) as rewards:
        assert rewards.score([]).errors == 0


# Worker processes


@pytest.mark.timeout(60)
def test_configured_functions_keep_their_state(module: Callable[..., RewardConfig]):
    with runner(module("count"), module("slow"), module("Keeps")) as rewards:
        assert rewards.names == ["count", "slow", "Keeps"]
        for step in (1, 2):
            scored = groups(["a"], ["b"])
            rewards.score(scored)
            assert parts(scored[1]) == {"count": [step], "slow": [2.0], "Keeps": [2 * step]}


@pytest.mark.faults
@pytest.mark.timeout(60)
def test_a_reward_function_that_hangs_is_killed_at_its_deadline(module: Callable[..., RewardConfig]):
    with pytest.raises(
        RewardError, match=r"`hang` .* failed on .* timeout_s=0\.5 and was killed \(rewards\.functions\[0\]"
    ):
        score(module("hang", timeout_s=0.5), ["a"])
    with runner(module("hang", timeout_s=0.5), module("length"), on_error="mask") as rewards:
        scored = groups(["a"], ["b"])
        assert rewards.score(scored).errors == 2
    assert [g.rewards for g in scored] == [[None], [None]]
    assert parts(scored[0]) == {"hang": [None], "length": [1.0]}


@pytest.mark.faults
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("die", r"its process died with exit code 3"),
        ("leave", r"it raised SystemExit"),
        ("divide", r"ZeroDivisionError: division by zero \(.*mine\.py, line 12\)"),
    ],
)
def test_a_reward_function_that_fails_in_its_process_is_named(
    module: Callable[..., RewardConfig], name: str, message: str
):
    with pytest.raises(
        RewardError, match=rf"reward `{name}` \(rewards\.functions\[0\]\) failed on a completion of row 10: .*{message}"
    ):
        score(module(name), [""])


@pytest.mark.timeout(60)
@pytest.mark.parametrize("names", [["hang"], ["hang", "sleeps"], ["math", "hang", "sleeps"]])
def test_ctrl_c_while_functions_hang_ends_at_once(tmp_path: Path, names: list[str]):
    (tmp_path / "hang.py").write_text("import time\ndef hang(completions): print('in', flush=True); time.sleep(600)\n")
    (tmp_path / "sleeps.py").write_text("import asyncio\nasync def sleeps(completions): await asyncio.sleep(600)\n")
    functions = [name if name == "math" else f"{tmp_path}/{name}.py:{name}" for name in names]
    script = tmp_path / "script.py"
    script.write_text(
        "from pgrpo.config import RewardConfig\nfrom pgrpo.rewards import RewardRunner\nfrom pgrpo.types import *\n"
        "if __name__ == '__main__':\n"
        f"    configs = [RewardConfig(name) for name in {functions!r}]\n"
        "    prompt, sample = Prompt(0, 'a', [1], {'answer': 1}), Sample([1], [1], [True], [0.0])\n"
        "    with RewardRunner(configs, on_error='raise') as runner:\n"
        "        runner.score([Group(prompt, [Episode([sample], '1.0', 'stop')])])\n"
    )
    process = subprocess.Popen(
        [sys.executable, script],
        cwd=REPOSITORY,
        env={"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=30)  # until every process that holds its pipes is gone
    assert time.monotonic() - begin < 15
    assert process.returncode == -signal.SIGINT
    assert b"KeyboardInterrupt" in errors
    assert b"rewards are closed" not in errors


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["math", "length"])
def test_a_script_without_a_main_guard_stops_with_the_reason(
    module: Callable[..., RewardConfig], tmp_path: Path, name: str
):
    function = name if name == "math" else module(name).function
    script = tmp_path / "script.py"
    script.write_text(
        "from pgrpo.config import RewardConfig\nfrom pgrpo.rewards import RewardRunner\nfrom pgrpo.types import *\n"
        f"runner = RewardRunner([RewardConfig({function!r})], on_error='raise')\n"
        "prompt, sample = Prompt(0, 'a', [1], {'answer': 1}), Sample([1], [1], [True], [0.0])\n"
        "runner.score([Group(prompt, [Episode([sample], '1.0', 'stop')])])\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=REPOSITORY, env={"PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"RewardError: reward `{name}`: no worker process can start" in done.stderr
    assert "needs its call under `if __name__ == '__main__':`" in done.stderr


def test_a_field_of_a_column_is_named_with_a_dot():
    nested = {"reward_model": {"ground_truth": "34", "style": "rule"}}
    config = RewardConfig("exact_match", args={"column": "reward_model.ground_truth"})
    with runner(config) as rewards:
        scored = groups(["34", "35"], **nested)
        rewards.score(scored)
        assert scored[0].rewards == [1, 0]
        rewards.check(groups(["a"], reward_model=None)[0].prompt)  # ``bad_golds`` says so of each row
        message = r"`exact_match`: the data has no column `reward_model\.ground_truth`; reward_model has answer, style"
        with pytest.raises(ConfigError, match=message):
            rewards.check(groups(["a"], reward_model={"answer": 1, "style": "rule"})[0].prompt)


@pytest.mark.timeout(60)
def test_golds_of_all_rows_are_read_by_the_rewards_that_need_them():
    golds = ["7", "proof", None, "???", {"a": 1}, "8"]
    prompts = [Prompt(10 + i, "q\n<think>\n", [1], {"answer": gold}) for i, gold in enumerate(golds)]
    with runner(RewardConfig("math"), lambda completions, column="answer": 1 / 0) as rewards:
        bad = rewards.bad_golds(prompts)
    assert bad == {
        11: "math: the answer 'proof' in column `answer` is not an answer",
        12: "math: the answer in column `answer` is empty",
        13: "math: the answer '???' in column `answer` cannot be parsed as mathematics",
        14: "math: the answer in column `answer` is a mapping; name answer.a",
    }
    nested = [Prompt(i, "q", [1], {"r": r}) for i, r in enumerate([{"gold": "A"}, {"gold": "E"}, None, {"other": 1}])]
    with runner(RewardConfig("choice", args={"column": "r.gold"})) as rewards:
        assert [(i, why.split(" in ")[0]) for i, why in rewards.bad_golds(nested).items()] == [
            (1, "choice: the answer 'E'"), (2, "choice: the answer"), (3, "choice: the answer")
        ]  # fmt: skip
    tests = [["assert f() == 1"], [], [{"input": "1", "output": "2"}]]
    with runner(RewardConfig("code")) as rewards:
        assert [*rewards.bad_golds([Prompt(i, "q", [1], {"tests": t}) for i, t in enumerate(tests)])] == [1]


def test_style_messages_gives_lists_of_messages_as_trl_does(tmp_path: Path):
    path = tmp_path / "trl.py"
    path.write_text(
        "def f(prompts, completions, answer):\n"
        "    return [float(c[0]['content'] == a and p[-1]['role'] == 'user') for p, c, a in zip(prompts, completions, answer)]\n"
    )
    chat = [{"role": "system", "content": "hi"}, {"role": "user", "content": "1+1"}]
    config = RewardConfig(f"{path}:f", style="messages")
    for messages in (chat, None):
        with runner(config) as rewards:
            scored = groups(["0", "1"], messages=messages)
            rewards.score(scored)
        assert scored[0].rewards == [1, 0]

    def from_python(completions):
        return [len(c[0]["content"]) for c in completions]

    hint = r"string indices must be integers.*: write `c` for `c\[0\]\[\"content\"\]`, or set"
    with pytest.raises(RewardError, match=rf"{hint} rewards\.functions\[0\]\.style: messages"):
        score(RewardConfig(f"{path}:f"), ["0"])
    with pytest.raises(RewardError, match=rf"{hint} the function's attribute style to 'messages'"):
        score(from_python, ["ab"])
    from_python.style = "messages"
    assert score(from_python, ["ab", "c"]) == [[2, 1]]
    with pytest.raises(ConfigError, match=r"rewards\.functions\[0\]\.style: exact_match is built in and reads texts"):
        runner(RewardConfig("exact_match", style="messages"))


# Failures


def one_bad_completion(result: Callable, message: str):
    """It is shown, with its function and row, or it alone is left out, counted."""

    def mine(completions):
        return result(completions)

    text = rf"`mine` \(rewards\[0\]\) failed on a completion of row 11: .*{message}.*; prompt: 'prompt 1', completion: 'bad'; "
    with pytest.raises(RewardError, match=f"^reward {text}rewards.on_error=mask leaves such samples out$"):
        score(mine, ["a", "b"], ["c", "bad"])
    with runner(mine, on_error="mask") as rewards:
        scored = groups(["a", "b"], ["c", "bad"])
        report = rewards.score(scored)
    assert [g.rewards for g in scored] == [[1.0, 1.0], [1.0, None]]
    assert report.errors == 1
    assert report.first_error is not None
    assert "completion: 'bad'" in report.first_error


@pytest.mark.faults
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda c: [ValueError("odd") if t == "bad" else 1.0 for t in c], "it returned the error ValueError: odd"),
        (lambda c: [1.0 / (t != "bad") for t in c], r"ZeroDivisionError: .*test_reward_runner\.py, line \d+"),
    ],
)
def test_a_reward_that_raises_on_one_completion_shows_the_sample(result: Callable, message: str):
    one_bad_completion(result, message)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda c: [math.nan if t == "bad" else 1.0 for t in c], "returned nan, not a finite number or None"),
        (lambda c: [math.inf if t == "bad" else 1.0 for t in c], "returned inf, not a finite number or None"),
        (lambda c: ["1.0" if t == "bad" else 1.0 for t in c], "returned '1.0', not a finite number or None"),
        (lambda c: [[1.0] if t == "bad" else 1.0 for t in c], r"returned \[1\.0\], not a finite number or None"),
        (
            lambda c: [1e308 if t == "bad" else 1.0 for t in c],
            r"returned 1e\+308, not a number of magnitude at most 1e\+100",
        ),
        (
            lambda c: [10**400 if t == "bad" else 1.0 for t in c],
            r"returned 10+, not a number of magnitude at most 1e\+100",
        ),
    ],
)
def test_a_reward_that_is_not_a_finite_number_shows_the_sample(result: Callable, message: str):
    one_bad_completion(result, message)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda c: [1.0 for t in c if t != "bad"], "returned 0 values for 1 completions"),
        (lambda c: [1.0 for t in c for _ in range(1 + (t == "bad"))], "returned 2 values for 1 completions"),
    ],
)
def test_too_few_or_too_many_rewards_are_an_error(result: Callable, message: str):
    one_bad_completion(result, message)


@pytest.mark.faults
@pytest.mark.parametrize("result", [[1.0], [], [1.0] * 3])
def test_a_function_that_always_returns_the_wrong_number_of_rewards_blames_no_row(result: list[float]):
    def mine(completions):
        return result

    message = rf"reward `mine` (rewards[0]) failed: it returned {len(result)} values for 4 completions; "
    with pytest.raises(RewardError, match=f"^{re.escape(message)}return one number for each completion$"):
        score(mine, ["a", "b"], ["c", "d"])
    assert score(mine, ["a", "b"], ["c", "d"], on_error="mask") == [[None, None], [None, None]]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (1.0, "returned 1.0, not a list"),
        (None, "returned None, not a list"),
        ("ab", "returned 'ab', not a list"),
        ({"a": 1.0}, "returned {'a': 1.0}, not a list"),
        (np.float64(1.0), "returned 1.0, not a list"),
        ([[1.0], [1.0]], "returned 2 values for 3 completions"),
    ],
)
def test_one_number_for_the_whole_batch_is_an_error(result: Any, message: str):
    with pytest.raises(RewardError, match=message):
        score(lambda completions: result, ["a", "b", "c"])


@pytest.mark.faults
@pytest.mark.parametrize("result", [math.nan, math.inf, "1.0", ValueError("odd")])
def test_a_non_numeric_reward_is_not_computed_a_second_time(result: Any):
    calls = []

    def mine(completions):
        calls.append(len(completions))
        return [result if c == "bad" else 1.0 for c in completions]

    assert score(mine, ["a", "bad", "c"], on_error="mask") == [[1.0, None, 1.0]]
    assert calls == [3]


@pytest.mark.faults
def test_none_for_one_sample_is_allowed_and_none_for_all_is_an_error():
    assert score(lambda completions: [None, 1.0], ["a", "b"]) == [[None, 1.0]]
    with pytest.raises(RewardError, match="returned None, not a list with one entry a completion"):
        score(lambda completions: None, ["a", "b"])


def test_a_failed_part_masks_the_sample_and_not_the_others():
    def fails(completions):
        return [math.nan, 1.0]

    with runner(fails, lambda completions: [5.0, 5.0], on_error="mask") as rewards:
        scored = groups(["a", "b"])
        assert rewards.score(scored).errors == 1
    assert scored[0].rewards == [None, 6.0]  # not 5: a sample that lost a part has no comparable total


def test_a_function_that_fails_on_the_batch_alone():
    def together(completions):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1.0]

    with pytest.raises(RewardError, match=r"too many.*fails on these 2 completions together but on none of them alone"):
        score(together, ["a", "b"])
    assert score(together, ["a", "b"], on_error="mask") == [[None, None]]


def test_long_samples_are_shortened():
    with pytest.raises(RewardError) as caught:
        score(lambda completions: [math.nan], ["x" * 5000 + "end"])
    assert len(str(caught.value)) < 1000
    assert "xend'" in str(caught.value)


@pytest.mark.timeout(60)
def test_an_unreadable_answer_names_its_row():
    with runner(RewardConfig("math")) as rewards:
        scored = groups(["0"], ["1"])
        scored[1].prompt.columns["answer"] = "???"
        with pytest.raises(
            RewardError,
            match=r"`math` \(rewards\.functions\[0\]\) failed on a completion of row 11: .*'\?\?\?' in column `answer`",
        ):
            rewards.score(scored)


# Mistakes that are found before anything is loaded


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RewardConfig("exact_mach"), r"rewards\.functions\[0\]\.function: no built-in .*did you mean `exact_match`\?"),
        (RewardConfig("zzz"), r"no built-in reward `zzz`; there are exact_match, contains_answer, format_regex, math"),
        (RewardConfig("no_such_thing:f"), r"cannot import module `no_such_thing`"),
        (RewardConfig("/nowhere/f.py:f"), r"rewards\.functions\[0\]\.function: no file /nowhere/f\.py"),
        (RewardConfig("exact_match", args={"colum": "a"}), r"no argument `colum`; it has column"),
        (RewardConfig("exact_match", args={"completions": "a"}), r"no argument `completions`"),
        (RewardConfig("format_regex"), r"args of format_regex: .*missing 1 required .*'pattern'"),
        (RewardConfig("format_regex", args={"pattern": "("}), r"args of format_regex: missing \)"),
        (RewardConfig("format_regex", args={"pattern": "a", "match": "al"}), r"match must be full or search, not 'al'"),
    ],
)
def test_config_errors(config: RewardConfig, message: str):
    with pytest.raises(ConfigError, match=message):
        runner(config)


def test_a_reward_of_another_trainer_is_told_what_there_is_here():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return 1.0

    with (
        runner(compute_score) as rewards,
        pytest.raises(ConfigError, match=r"; verl calls `compute_score` once a sample"),
    ):
        rewards.check(groups(["a"])[0].prompt)


@pytest.mark.parametrize(
    ("function", "column"),
    [
        (RewardConfig("exact_match", args={"column": "gold"}), "gold"),
        (RewardConfig("math", args={"column": "gold"}), "gold"),
        (lambda completions, level: [0.0], "level"),
        (lambda completions, messages: [0.0], "messages"),
    ],
)
def test_missing_columns(function: Any, column: str):
    with (
        runner(function) as rewards,
        pytest.raises(ConfigError, match=rf"needs the column `{column}`; .* has answer, id"),
    ):
        rewards.check(groups(["a"], id=1)[0].prompt)
    if column != "messages":
        with runner(function) as rewards:
            rewards.check(groups(["a"], **{column: 1})[0].prompt)
