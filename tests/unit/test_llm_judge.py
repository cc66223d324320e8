"""llm_judge against a small server: what it sends, how often it tries, and that the key is nowhere but in the header."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from pgrpo.config import ConfigError, RewardConfig
from pgrpo.rewards import RewardRunner
from pgrpo.rewards import llm_judge as module
from pgrpo.rewards.llm_judge import LlmJudge

KEY = "sk-hunter2"


class Judge:
    """Answers with ``reply(text, how often this text came)``: a text (a chat completion), or (HTTP status, body)."""

    def __init__(self) -> None:
        self.reply: Callable[[str, int], Any] = lambda text, n: "Score: 5"
        self.seen: list[tuple[dict, dict]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                with judge.lock:
                    judge.seen.append((dict(self.headers), body))
                    count = sum(b["messages"][0]["content"] == text for _, b in judge.seen)
                    judge.at_once += 1
                    judge.most_at_once = max(judge.most_at_once, judge.at_once)
                reply = judge.reply(text, count)
                with judge.lock:
                    judge.at_once -= 1
                message = {"choices": [{"message": {"content": reply}}]}
                status, data = reply if isinstance(reply, tuple) else (200, json.dumps(message))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", data)
                self.end_headers()
                self.wfile.write(data.encode())

            def do_GET(self) -> None:
                judge.seen.append((dict(self.headers), {"messages": [{"content": "redirected"}]}))
                self.send_error(404)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judge]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(module.random, "uniform", lambda *_: 0.05)  # pauses of 0.05, 0.1, 0.2 s
    made = Judge()
    yield made
    made.server.shutdown()
    made.server.server_close()


def ask(judge: Judge, *completions: str, **args: Any) -> list[Any]:
    args = {"url": judge.url, "model": "m", "template": "{completion}"} | args
    return LlmJudge()([f"prompt {c}" for c in completions], list(completions), **args)


def test_scores_and_what_is_sent(judge: Judge):
    judge.reply = lambda text, n: f"Score: 1 is too low.\nScore: **{len(text)}**"
    assert ask(judge, "", "abc", "日本", "{braces}", "x" * 10) == [0.0, 0.3, 0.2, 0.8, 1.0]
    headers, body = judge.seen[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["max_tokens"], body["messages"][0]["role"]) == ("m", 1024, "user")
    assert ask(judge, "abcd", best=5, key_env=None) == [0.8]
    assert "Authorization" not in judge.seen[-1][0]


def test_the_template_sees_columns_and_the_last_question(judge: Judge):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "why?"}]
    template = "{prompt}|{completion}|{answer}"
    args = {"template": template, "answer": ["so"], "url": judge.url, "model": "m"}
    assert LlmJudge()(["<chat>why?"], ["because"], messages=[chat], **args) == [0.5]
    assert LlmJudge()(["raw"], ["because"], **args) == [0.5]
    assert [body["messages"][0]["content"] for _, body in judge.seen] == ["why?|because|so", "raw|because|so"]
    LlmJudge()(["q"], ["c"], url=judge.url, model="m")
    assert "<question>\nq\n</question>" in judge.seen[-1][1]["messages"][0]["content"]


@pytest.mark.parametrize("first", [(429, "slow down"), (500, "oops"), (503, "busy")])
def test_what_may_pass_is_tried_again(judge: Judge, first: tuple[int, str]):
    judge.reply = lambda text, n: first if n < 4 else "Score: 10"
    assert ask(judge, "a", "b") == [1.0, 1.0]
    assert len(judge.seen) == 8


def test_what_will_not_pass_is_not(judge: Judge):
    judge.reply = lambda text, n: (401, f"no such key: {KEY}")
    [error] = ask(judge, "a")
    assert isinstance(error, RuntimeError)
    assert str(error) == f"the judge failed: {judge.url}/chat/completions: HTTP 401: no such key: ***"
    assert len(judge.seen) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("I like it", "no score in its reply 'I like it'"),
        ("", "no score in its reply ''"),
        ("Score: 11", "the score 11 is not from 0 to 10"),
        ((200, "<html>"), "not a chat completion (JSONDecodeError"),
        ((200, '{"choices": []}'), "not a chat completion (IndexError"),
        ((200, "[]"), "not a chat completion (TypeError"),
    ],
)
def test_replies_without_a_score_fail_their_sample_alone(judge: Judge, reply: Any, message: str):
    judge.reply = lambda text, n: reply if text == "bad" else "Score: 4"
    good, bad = ask(judge, "good", "bad")
    assert good == 0.4
    assert message in str(bad)


def test_a_deadline_ends_the_trying(judge: Judge):
    judge.reply = lambda text, n: (500, f"oops {KEY}")
    begin = time.monotonic()
    [error] = ask(judge, "a", deadline_s=0.5)
    assert time.monotonic() - begin < 1.5
    assert "HTTP 500: oops *** (tried" in str(error)
    assert KEY not in str(error)


def test_a_server_that_hangs_or_is_not_there(judge: Judge):
    judge.reply = lambda text, n: time.sleep(1.0) or "Score: 1"
    begin = time.monotonic()
    [error] = ask(judge, "a", timeout_s=0.2, deadline_s=0.6)
    assert time.monotonic() - begin < 2
    assert "timed out" in str(error)
    [error] = ask(judge, "a", url="http://127.0.0.1:9/v1", deadline_s=0.2)
    assert "Connection refused" in str(error)


def test_requests_overlap_up_to_concurrency(judge: Judge):
    judge.reply = lambda text, n: time.sleep(0.1) or "Score: 1"
    begin = time.monotonic()
    assert ask(judge, *map(str, range(12)), concurrency=4) == [0.1] * 12
    assert judge.most_at_once == 4
    assert time.monotonic() - begin < 1.0  # one by one: 1.2 s


def test_closing_ends_the_trying_and_what_did_not_begin(judge: Judge):
    judge.reply = lambda text, n: (500, "oops")
    reward, results = LlmJudge(), []

    def call() -> None:
        try:
            results.append(reward(["p"] * 4, list("abcd"), url=judge.url, model="m", key_env=None, concurrency=1))
        except CancelledError:
            results.append("cancelled")

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.3)
    reward.close()
    thread.join(5)
    assert results == ["cancelled"]
    assert {body["messages"][0]["content"].count("<answer>\na\n") for _, body in judge.seen} == {1}


@pytest.mark.faults
def test_the_api_key_does_not_follow_a_redirect(judge: Judge):
    judge.reply = lambda text, n: (302, f"{judge.url}/elsewhere")
    [error] = ask(judge, "a")
    assert "HTTP 404" in str(error)
    assert ["Authorization" in headers for headers, _ in judge.seen] == [True, False]


@pytest.mark.faults
def test_the_api_key_is_in_no_message_of_the_run(judge: Judge):
    from pgrpo.types import Completion, Group, Prompt

    judge.reply = lambda text, n: (400, f"Bearer {KEY} is bad")
    config = RewardConfig("llm_judge", args={"url": judge.url, "model": "m"})
    group = Group(Prompt(7, "p", [1]), [Completion([1], [0.0], [True], "stop", "c")])
    with RewardRunner([config], on_error="mask") as runner:
        report = runner.score([group])
    assert group.rewards == [None]
    assert (report.errors, KEY in str(report.first_error)) == (1, False)
    assert (
        "reward `llm_judge` (rewards.functions[0]) failed on a completion of row 7: "
        "it returned the error RuntimeError: the judge failed" in str(report.first_error)
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "missing 2 required .*'url' and 'model'"),
        ({"url": "file:///etc/passwd", "model": "m"}, "url must begin with http"),
        ({"url": "http://x", "model": "m", "pattern": "score"}, "pattern needs a group"),
        ({"url": "http://x", "model": "m", "pattern": "("}, "missing"),
        ({"url": "http://x", "model": "m", "concurrency": 0}, "must be above 0"),
        ({"url": "http://x", "model": "m", "key_env": "NO_SUCH_KEY"}, "variable NO_SUCH_KEY is not set"),
    ],
)
def test_mistakes_are_found_at_the_start(judge: Judge, args: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=rf"functions\[0\]\.args of llm_judge: .*{message}"):
        RewardRunner([RewardConfig("llm_judge", args=args)], on_error="raise")
