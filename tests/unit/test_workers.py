"""Tools and environments of a config run in worker processes: what they see, and what a crash or a hang ends."""

from __future__ import annotations

import inspect
import os
import signal
import time
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from playing import END, PARAMS, TOKENIZER, Scripted, call, ids, one, play, prompt_of, turns
from transformers.utils.chat_template_utils import get_json_schema

from pgrpo.config import Config, ConfigError, redact
from pgrpo.config.task import EnvironmentConfig
from pgrpo.environments import episodes as loop
from pgrpo.environments.calls import CallFailed
from pgrpo.environments.signatures import function_of, said_of
from pgrpo.environments.toolbox import load_toolbox
from pgrpo.environments.workers import Nursery

OWN = """
import asyncio, os, signal, subprocess, time

def see(which: str) -> str:
    '''See a variable.

    Args:
        which: Its name.
    '''
    return os.environ.get("PATH" if which == "path" else which, "nothing")

def leave(x: int) -> str:
    '''End the process, or sleep, or say how it is.

    Args:
        x: Which.
    '''
    if x == 1:
        os._exit(1)
    if x == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if x == 3:
        child = subprocess.Popen(["sleep", "77.125"])
        open(os.path.join(os.path.dirname(__file__), f"child_{child.pid}"), "w").close()
        time.sleep(60)
    if x == 4:
        raise SystemExit(4)
    if x == 5 and (pid := os.fork()):
        return f"parent, child ended with {os.waitpid(pid, 0)[1]}"
    return str(os.getpid())

def shout(x: int) -> str:
    '''Say much.

    Args:
        x: How often.
    '''
    return "a" * x

class Game:
    def __init__(self, bad=-1, how="raise"):
        self.bad, self.how, self.turn = bad, how, 0

    async def reset(self, row=0, **_):
        await asyncio.sleep(0)
        self.row, self.turn = row, 0
        return f" from {row}"

    def move(self, by: int) -> str:
        '''Move.

        Args:
            by: How far.
        '''
        self.turn += 1
        if self.turn == 3 and self.row == self.bad:
            if self.how == "raise":
                raise RuntimeError("the board is gone")
            if self.how == "hang":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL)
        return f"{self.row + self.turn * by}"

    def get_reward(self):
        return float(self.turn)

    def close(self):
        open(os.environ.get("PYTHON_CLOSED", os.devnull), "a").write("closed ")
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return str(path)


class Color(Enum):
    RED = "red"
    BLUE = "blue"


def much(
    a: int, b: list[str], c: Literal["x", "y"], d: dict[str, float] | None = None, *, e: Color, f: Any = 3
) -> bool:
    """Have hints of all kinds.

    Args:
        a: One.
        b: Two.
        c: Three. (choices: ["x", "y"])
        d: Four.
        e: Five.
        f: Six.

    Returns:
        Whether.
    """
    return True


def plain(x):
    return x


def test_a_schema_is_the_same_by_way_of_a_worker():
    said = said_of(much)
    assert said is not None
    assert get_json_schema(function_of(said)) == get_json_schema(much)
    assert str(inspect.signature(function_of(said))).count(":") == 6
    with pytest.raises(Exception, match="no docstring"):
        get_json_schema(function_of(said_of(plain) or {}))


def test_workers_see_no_variables_but_those_that_are_named(own, monkeypatch):
    monkeypatch.setenv("my_api_key", "sk-of-the-trainer")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # a long one would not fit the episode
    script = turns(f"{call('see', which='my_api_key')}{call('see', which='path')}<|im_end|>", "ok<|im_end|>")
    tools = [f"{own}:see"]
    hidden = one(script, tools=tools)
    assert [m["content"] for m in hidden.messages[1:3]] == ["nothing", os.environ["PATH"]]
    shown = one(script, tools=tools, secrets=["my_api_key"])
    assert shown.messages[1]["content"] == "sk-of-the-trainer"
    assert "sk-of" not in redact(f"it said {shown.messages[1]['content']}")
    with pytest.raises(ConfigError, match=r"environment.secrets: the environment variable NOT_THERE is not set"):
        load_toolbox(Config(tools=tools, environment=EnvironmentConfig(secrets=["NOT_THERE"])))


def test_the_trainer_does_not_import_what_a_config_names(tmp_path):
    path = tmp_path / "imported.py"
    path.write_text(f"import os\nopen({str(tmp_path / 'pids')!r}, 'a').write(f'{{os.getpid()}} ')\n{OWN}")
    one(turns(f"{call('see', which='path')}<|im_end|>", "ok<|im_end|>"), tools=[f"{path}:see"])
    pids = (tmp_path / "pids").read_text().split()
    assert pids and str(os.getpid()) not in pids


@pytest.mark.parametrize(
    ("how", "reason", "error"),
    [
        (1, "environment", "leave: its worker process ended in the middle of the call"),
        (2, "environment", "leave: its worker process ended in the middle of the call"),
        (3, "timeout", "a call took longer than 1 s"),
    ],
)
def test_a_crash_or_hang_ends_its_episode_alone_and_the_process_is_replaced(own, how, reason, error):
    def script(text: str) -> str:
        done = text.count("assistant") - 1
        x = how if "one" in text and done == 1 else 0
        return f"{call('leave', x=x)}<|im_end|>" if done < 3 else "ok<|im_end|>"

    rows = [{"text": "one"}, {"text": "two"}, {"text": "one"}]
    started = time.monotonic()
    (first, second, third), _ = play(
        script, tools=[f"{own}:leave"], rows=rows, call_timeout_s=1.0 if how == 3 else 60.0
    )
    assert time.monotonic() - started < 20
    assert [e[0].finish_reason for e in (first, second, third)] == [reason, "stop", reason]
    assert error in first[0].messages[-1]["content"] and first[0].messages[-1]["role"] == "environment"
    said = [m["content"] for m in second[0].messages if m["role"] == "tool"]
    assert len(said) == 3 and all(pid.isdecimal() for pid in said)
    children = [int(path.name.removeprefix("child_")) for path in Path(own).parent.glob("child_*")]
    assert bool(children) == (how == 3)
    for pid in children:  # what the tool had started ends with it
        wait_for_the_end_of(pid)


def test_system_exit_is_told(own):
    episode = one(turns(f"{call('leave', x=4)}<|im_end|>", "ok<|im_end|>"), tools=[f"{own}:leave"])
    assert (episode.messages[1]["content"], episode.finish_reason) == ('{"error": "SystemExit: 4"}', "stop")


def test_a_tool_that_forks_answers_once_and_its_child_ends(own):
    forks = f"{call('leave', x=5)}<|im_end|>"
    episode = one(turns(forks, forks, "ok<|im_end|>"), tools=[f"{own}:leave"])
    results = [m["content"] for m in episode.messages if m["role"] == "tool"]
    assert results == ["parent, child ended with 0"] * 2 and episode.finish_reason == "stop"


def test_a_result_of_100_000_tokens_from_a_worker(own):
    script = turns(f"{call('shout', x=100_000)}<|im_end|>", "ok<|im_end|>")
    episode = one(script, tools=[f"{own}:shout"], turn=100, episode=400)
    assert episode.finish_reason == "stop" and episode.counts["cut_results"] == 1
    assert episode.messages[1]["content"].endswith("a\n[the rest is cut]")
    assert len(episode.token_ids) <= 300 + len(ids("ok<|im_end|>"))


@pytest.mark.parametrize(("how", "reason"), [("raise", "environment"), ("hang", "timeout"), ("die", "environment")])
def test_an_environment_that_fails_at_turn_3_ends_its_episode(own, how, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON_CLOSED", str(tmp_path / "closed"))
    script = turns(*[f"{call('move', by=10)}<|im_end|>"] * 4, "ok<|im_end|>")
    (bad, good), _ = play(
        script, environment=f"{own}:Game", rows=[{"row": 1}, {"row": 2}], args={"bad": 1, "how": how},
        call_timeout_s=1.0 if how == "hang" else 60.0, on_error="end",
    )  # fmt: skip
    assert (bad[0].finish_reason, good[0].finish_reason) == (reason, "stop")
    assert [m["content"] for m in bad[0].messages if m["role"] == "tool"] == ["11", "21"]
    assert [m["content"] for m in good[0].messages if m["role"] == "tool"] == ["12", "22", "32", "42"]
    assert good[0].own_rewards == {"Game": 4.0} and bad[0].own_rewards == {}
    assert good[0].prompt is not None and "go from 2" in good[0].prompt.text
    # One was looked at. Those that are still sound are closed at the end.
    assert (tmp_path / "closed").read_text() == "closed " * (3 if how == "raise" else 2)


def test_crashes_in_a_row_stop_the_run(own):
    with pytest.raises(
        loop.EnvironmentFailed, match=r"in 32 episodes in a row; the last error: leave: its worker process"
    ):
        play(turns(f"{call('leave', x=1)}<|im_end|>"), tools=[f"{own}:leave"], size=loop.MOST_FAILURES)


def test_timeouts_in_a_row_stop_the_run_too(own):
    with pytest.raises(
        loop.EnvironmentFailed, match=r"in 32 episodes in a row; the last error: a call took longer than 0.2 s"
    ):
        play(
            turns(f"{call('leave', x=3)}<|im_end|>"),
            tools=[f"{own}:leave"],
            size=loop.MOST_FAILURES,
            call_timeout_s=0.2,
        )


def three_episodes(made, toolbox):
    """Of rows 1, 2 and 2, one after the other: why each ended, and the process of its environment."""
    reasons, pids = [], []
    for row in (1, 2, 2):
        groups = made.generate([prompt_of(toolbox, row=row)], PARAMS, [[1]], 1, lambda *_: None)
        pids.append(groups[0].episodes[0].environment._worker.pid)
        made.release(groups)
        reasons.append(groups[0].episodes[0].finish_reason)
    return reasons, pids


def test_an_environment_whose_process_died_is_made_anew(own):
    toolbox = load_toolbox(Config(environment=EnvironmentConfig(factory=f"{own}:Game", args={"bad": 1, "how": "die"})))
    script = turns(*[f"{call('move', by=10)}<|im_end|>"] * 3, "ok<|im_end|>")
    chats, engine = toolbox.chats(TOKENIZER, [END], {}), Scripted(script)
    settings: Any = (EnvironmentConfig(), 600, 300, lambda: False)
    made = loop.ToolLoop(engine, [], toolbox.kinds, chats, *settings, toolbox.nursery)  # pyright: ignore
    reasons, pids = three_episodes(made, toolbox)
    made.close()
    assert reasons == ["environment", "stop", "stop"]
    assert pids[0] != pids[1] == pids[2]  # a sound one is used again


def wait_for_the_end_of(pid: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_environment_still_inside_its_converse_is_made_anew_and_its_process_ends(tmp_path):
    path = tmp_path / "leads.py"
    path.write_text(
        "class Leads:\n    def reset(self, row, **_): self.row = row\n"
        "    async def converse(self, conversation):\n        await conversation.generate()\n"
        "    def move(self) -> str:\n        'Move.'\n        if self.row == 1: raise ValueError('stuck')\n        return 'ok'\n"
    )
    settings = EnvironmentConfig(factory=f"{path}:Leads", on_error="end")
    toolbox = load_toolbox(Config(environment=settings))
    chats, engine = toolbox.chats(TOKENIZER, [END], {}), Scripted(turns(f"{call('move')}<|im_end|>", "ok<|im_end|>"))
    more: Any = (settings, 600, 300, lambda: False)
    made = loop.ToolLoop(engine, [], toolbox.kinds, chats, *more, toolbox.nursery)  # pyright: ignore
    reasons, pids = three_episodes(made, toolbox)
    wait_for_the_end_of(pids[0])
    made.close()
    assert reasons == ["environment", "stop", "stop"] and pids[0] != pids[1] == pids[2]


def test_a_slow_import_is_not_a_slow_call(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\ntime.sleep(1.2)\ndef f() -> str:\n    'Say.'\n    return 'ok'\n"
        "class Slow:\n    def reset(self, **row): return None\n"
    )
    script = turns(f"{call('f')}<|im_end|>", "done<|im_end|>")
    episode = one(script, tools=[f"{path}:f"], environment=f"{path}:Slow", call_timeout_s=1.0)
    assert episode.finish_reason == "stop" and [m["content"] for m in episode.messages][1] == "ok"


def test_a_fork_that_fails_is_a_failed_call_and_the_next_may_succeed(tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nfork, tries = os.fork, []\ndef failing():\n    tries.append(1)\n    if len(tries) == 1:\n"
        "        raise BlockingIOError(11, 'no more processes')\n    return fork()\nos.fork = failing\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    nursery = Nursery()
    with pytest.raises(CallFailed, match="a worker process could not be started"):
        nursery.worker()
    assert nursery.worker().pid
    nursery.close()
    assert "a worker process cannot be forked: [Errno 11] no more processes" in capfd.readouterr().err


def test_a_nursery_that_was_killed_is_started_again():
    nursery = Nursery()
    first = nursery.worker()
    os.kill(int(os.popen(f"ps -o ppid= -p {first.pid}").read()), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{first.pid}/exe") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{first.pid}/exe")  # it went with it
    assert nursery.worker().pid != first.pid
    nursery.close()


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("import nosuch", "f", "cannot load .*No module named 'nosuch'"),
        ("import os; os._exit(1)", "f", "its worker process ended .*while a worker process loaded it"),
        ("f = 3", "f", "no function `f`"),
        ("class f: pass", "f", "a tool is a function with a name, not <class"),
        ("from __future__ import annotations\ndef f(x: nosuch): pass", "f", "tool `f`: name 'nosuch' is not defined"),
        ("def f(x): 'Do.'", "f", "missing a type hint"),
        ("def f(*x: int): 'Do.'", "f", "tool `f`: a model gives all arguments by name, so it cannot fill `x`"),
        ("def f(x: int, /): 'Do.'", "f", "tool `f`: a model gives all arguments by name, so it cannot fill `x`"),
        ("async def f(x: int):\n  'Do.'\n  yield x", "f", "tool `f`: it yields; return one value"),
    ],
)
def test_a_tool_that_cannot_be_used_is_refused(tmp_path, source, name, message):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ConfigError, match=message):
        load_toolbox(Config(tools=[f"{tmp_path}/bad.py:{name}"]))


def test_a_class_that_cannot_be_made_is_refused(own):
    config = Config(environment=EnvironmentConfig(factory=f"{own}:Game", args={"nosuch": 1}))
    with pytest.raises(ConfigError, match=r"environment.factory: cannot be made with environment.args={'nosuch': 1}"):
        load_toolbox(config)
    path = Path(own).with_name("less.py")
    path.write_text("class Less: pass")
    with pytest.raises(ConfigError, match="Less has no method `reset"):
        load_toolbox(Config(environment=EnvironmentConfig(factory=f"{path}:Less")))


def test_names_and_schemas_that_cannot_be_used_are_refused(own):
    with pytest.raises(ConfigError, match=r"environment.factory: environment='.*:Game' from Python is a name; set"):
        load_toolbox(Config(), environment=f"{own}:Game")

    schemas: list[dict] = []

    class Named:
        def reset(self) -> None: ...

        def tool_schemas(self):
            return schemas

    bare, taken = (
        {"name": "move", "parameters": {}},
        {"type": "function", "function": {"name": "close", "parameters": {}}},
    )
    for schema, said in ((bare, "tool_schemas gave"), (taken, "names a tool `close`")):
        schemas[:] = [schema]
        with pytest.raises(ConfigError, match=said):
            load_toolbox(Config(), environment=Named)


def test_a_result_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text("class Odd:\n    def reset(self, **row): return ''\n    def get_reward(self): return {(1, 2): 3}\n")
    reward = one(turns("ok<|im_end|>"), environment=f"{path}:Odd").own_rewards["Odd"]
    assert "its result is not JSON: TypeError" in str(reward)


def test_what_a_worker_started_ends_with_the_run(own, tmp_path):
    path = tmp_path / "starts.py"
    path.write_text(
        "import subprocess\nclass Starts:\n    def __init__(self): self.child = subprocess.Popen(['sleep', '300'])\n"
        "    def reset(self, **row): return ''\n    def get_reward(self): return float(self.child.pid)\n"
    )
    pid = int(one(turns("ok<|im_end|>"), environment=f"{path}:Starts").own_rewards["Starts"])
    wait_for_the_end_of(pid)


def test_what_needs_the_object_itself_is_refused(own):
    def judge(completions, environments):
        return [1.0 for _ in completions]

    toolbox = load_toolbox(Config(environment=EnvironmentConfig(factory=f"{own}:Game")))
    with pytest.raises(
        ConfigError, match=r"the reward `judge` wants `environments`, but a class that a config names lives"
    ):
        toolbox.check_rewards([judge])
    with pytest.raises(
        ConfigError, match=r"environment.secrets: \['PATH'\] has no effect on tools and classes from Python"
    ):
        load_toolbox(Config(environment=EnvironmentConfig(secrets=["PATH"])), [much])
