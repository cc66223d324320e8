"""Scoring of finished groups while others decode: what begins when, and that the order of finishing changes nothing."""

import itertools
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pgrpo.config import RewardConfig
from pgrpo.distributed.world import World
from pgrpo.environments.episodes import SingleTurn
from pgrpo.process.stopping import Stopped
from pgrpo.rewards import RewardError, RewardRunner
from pgrpo.rewards.reward_model import RewardModel
from pgrpo.training.rollout import sample_and_score
from pgrpo.types import Completion, Episode, Group, Prompt, Sample, SamplingParams

WORLD = World(0, 1, torch.device("cpu"))
BUILT_IN = RewardConfig("exact_match")


class Scripted:
    """An engine that finishes prompts when its script says so. A prompt's completions are the words of its text."""

    def __init__(self, script: Callable[[Callable[[int], None]], None]) -> None:
        self.script, self.ended = script, False

    def sample(self, requests: Sequence, params: SamplingParams, on_finished: Callable) -> None:
        def finish(position: int) -> None:
            words = TEXTS[position].split()
            on_finished(position, [Completion([1], [0.0], "stop", word) for word in words])

        self.script(finish)
        self.ended = True


TEXTS = ["a bb", "ccc dddd", "bad e"]
PROMPTS = [Prompt(10 + i, text, [1], {"answer": ""}) for i, text in enumerate(TEXTS)]


def rollout(rewards: RewardRunner, script: Callable, world: World = WORLD) -> list[Group]:
    engine: Any = Scripted(script)
    try:
        return sample_and_score(
            SingleTurn(engine), rewards, world, PROMPTS, SamplingParams(4), [[0, 1]] * len(PROMPTS)
        ).groups
    finally:
        assert engine.ended


def all_at_once(finish: Callable[[int], None]) -> None:
    for i in range(len(TEXTS)):
        finish(i)


def groups() -> list[Group]:
    return [
        Group(p, [Episode([Sample([1], [1], [True], [0.0])], word, "stop") for word in p.text.split()]) for p in PROMPTS
    ]


def lengths(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) for c in completions]


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Replaces what the config's ``exact_match`` calls."""
    return lambda function: monkeypatch.setattr("pgrpo.rewards.answers.exact_match", function)


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgrpo.rewards.scoring.TOGETHER_S", 0.0)


class Fifo:
    """A byte between this process and a worker, in either direction."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path, self.fd = path, os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def arrived(self) -> bool:
        return bool(select.select([self.fd], [], [], 30)[0] and os.read(self.fd, 1))


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Callable[[str], Fifo]]:
    made: list[Fifo] = []

    def make(name: str) -> Fifo:
        made.append(Fifo(tmp_path / name))
        return made[-1]

    yield make
    for one in made:
        os.close(one.fd)


# What begins when


def test_a_built_in_scores_a_finished_group_while_others_decode(built_in: Callable):
    scored = threading.Event()

    def watch(completions: list[str], **_: Any) -> list[float]:
        if "ccc" in completions:
            scored.set()
        return lengths(completions)

    def script(finish: Callable[[int], None]) -> None:
        finish(1)
        assert scored.wait(10)
        finish(2)
        finish(0)

    built_in(watch)
    with RewardRunner([BUILT_IN], on_error="raise") as rewards:
        found = rollout(rewards, script)
    assert [group.rewards for group in found] == [[1.0, 2.0], [3.0, 4.0], [3.0, 1.0]]
    assert [group.reward_part("watch") for group in found] == [[1.0, 2.0], [3.0, 4.0], [3.0, 1.0]]


@pytest.mark.timeout(60)
def test_a_configured_function_scores_while_others_decode_and_what_waits_for_it_is_one_call(
    tmp_path: Path, fifo: Callable[[str], Fifo]
):
    began, go_on = fifo("began"), fifo("go_on")
    (tmp_path / "mine.py").write_text(
        "def size(completions):\n"
        "    if 'ccc' in completions:\n"
        f"        open({str(began.path)!r}, 'wb', buffering=0).write(b'1')\n"
        f"        open({str(go_on.path)!r}, 'rb', buffering=0).read(1)\n"
        "    return [len(completions)] * len(completions)\n"
    )

    def script(finish: Callable[[int], None]) -> None:
        finish(1)
        assert began.arrived()
        finish(0)
        finish(2)
        os.write(go_on.fd, b"1")

    with RewardRunner([RewardConfig(f"{tmp_path}/mine.py:size")], on_error="raise") as rewards:
        found = rollout(rewards, script)
    assert [group.rewards for group in found] == [[4.0, 4.0], [2.0, 2.0], [4.0, 4.0]]


def test_a_slow_call_of_a_built_in_does_not_hold_up_other_groups(built_in: Callable):
    began, quick = threading.Event(), threading.Event()

    def watch(completions: list[str], **_: Any) -> list[float]:
        if "a" in completions:
            began.set()
            assert quick.wait(10)
        elif completions:  # not the check of the arguments
            quick.set()
        return lengths(completions)

    def script(finish: Callable[[int], None]) -> None:
        finish(0)
        assert began.wait(10)
        finish(1)
        assert quick.wait(10)
        finish(2)

    built_in(watch)
    with RewardRunner([BUILT_IN], on_error="raise") as rewards:
        assert rollout(rewards, script)[0].rewards == [1.0, 2.0]


def test_functions_from_python_and_reward_models_get_all_groups_at_once_after_sampling(
    monkeypatch: pytest.MonkeyPatch,
):
    calls: list[tuple[str, int, bool, bool]] = []
    sampled = threading.Event()

    def note(name: str, completions: list[str]) -> list[float]:
        here = threading.current_thread() is threading.main_thread()
        calls.append((name, len(completions), sampled.is_set(), here))
        return lengths(completions)

    def plain(completions: list[str]) -> list[float]:
        return note("plain", completions)

    async def unhurried(completions: list[str]) -> list[float]:
        return note("unhurried", completions)

    def model(self: RewardModel, completions: list[str], **_: Any) -> list[float]:
        return note("model", completions) if completions else []

    def script(finish: Callable[[int], None]) -> None:
        all_at_once(finish)
        sampled.set()

    monkeypatch.setattr(RewardModel, "__call__", model)
    functions = [RewardConfig("reward_model")]
    with RewardRunner(functions, on_error="raise", extra=[plain, unhurried]) as rewards:
        rollout(rewards, script)
    assert sorted(calls) == [("model", 6, True, True), ("plain", 6, True, True), ("unhurried", 6, True, False)]


def test_groups_that_finish_together_are_one_call(built_in: Callable, monkeypatch: pytest.MonkeyPatch):
    """However long the wait for others may be, it ends with the rollout."""
    sizes: list[int] = []
    monkeypatch.setattr("pgrpo.rewards.scoring.TOGETHER_S", 100.0)
    built_in(lambda completions, **_: sizes.append(len(completions)) or lengths(completions))
    with RewardRunner([BUILT_IN], on_error="raise") as rewards:
        sizes.clear()  # the check of the arguments
        rollout(rewards, all_at_once)
    assert sizes == [6]


# Results


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("on_error", ["raise", "mask"])
@pytest.mark.parametrize("wait", [0.0, 100.0])
def test_results_and_errors_do_not_depend_on_the_order_of_finishing(
    built_in: Callable, monkeypatch: pytest.MonkeyPatch, order: tuple, on_error: Any, wait: float
):
    """Nor on which groups share a call: most have one of their own, or all are in one."""
    monkeypatch.setattr("pgrpo.rewards.scoring.TOGETHER_S", wait)

    def fails(completions: list[str], **_: Any) -> list[float]:
        return [1.0 / ((c not in ("dddd", "bad")) * len(c)) for c in completions]

    def script(finish: Callable[[int], None]) -> None:
        for position in order:
            finish(position)

    built_in(lambda completions, **_: [] if not completions else fails(completions))
    message = r"`<lambda>` .* row 11: .*ZeroDivisionError.*completion: 'dddd'"
    with RewardRunner([BUILT_IN], on_error=on_error, extra=[lengths]) as rewards:
        if on_error == "raise":
            with pytest.raises(RewardError, match=message):
                rollout(rewards, script)
            return
        found = rollout(rewards, script)
        again = groups()
        report = rewards.score(again)
    assert report.errors == 2
    assert [g.rewards for g in found] == [g.rewards for g in again] == [[2.0, 2.5], [3 + 1 / 3, None], [None, 2.0]]
    assert [g.reward_part("lengths") for g in found] == [[1.0, 2.0], [3.0, 4.0], [3.0, 1.0]]


def test_a_reward_that_fails_early_is_raised_after_the_sampling(built_in: Callable):
    failed = threading.Event()

    def fails(completions: list[str], **_: Any) -> list[float]:
        if "bad" in completions:
            failed.set()
            raise ValueError("odd")
        return lengths(completions)

    def script(finish: Callable[[int], None]) -> None:
        finish(2)
        assert failed.wait(10)
        finish(0)
        finish(1)

    built_in(fails)
    with (
        RewardRunner([BUILT_IN], on_error="raise") as rewards,
        pytest.raises(RewardError, match=r"row 12: it raised ValueError: odd .*completion: 'bad'"),
    ):
        rollout(rewards, script)  # asserts that the engine came to its end


@pytest.mark.faults
def test_a_stop_signal_ends_scoring_and_closing_ends_its_threads():
    """The function never returns: only the signal ends the wait, and only closing ends the function."""
    import asyncio

    async def endless(completions: list[str]) -> list[float]:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        await asyncio.Event().wait()
        return []

    world = World(0, 1, torch.device("cpu"))
    before = signal.signal(signal.SIGTERM, lambda signum, _: world.stop.set(signum))
    try:
        with RewardRunner([], on_error="raise", extra=[endless]) as rewards:
            with pytest.raises(Stopped):
                rollout(rewards, all_at_once, world)
            left = [t for t in threading.enumerate() if t.name.startswith("pgrpo-rewards")]
            assert left
    finally:
        signal.signal(signal.SIGTERM, before)
    for thread in left:
        thread.join(10)
        assert not thread.is_alive()
