"""Sessions of OpenEnv: a stand-in of its harness that talks to a local server, and its own adapter of step environments, where the
package is installed (``pip install openenv``)."""

from __future__ import annotations

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from playing import call, play, turns

OWN = """
import json, urllib.request
from types import SimpleNamespace as Has

class Session:
    def __init__(self, url, task):
        self.url, self.task = url, task

    def _post(self, path, **body):
        request = urllib.request.Request(self.url + path, json.dumps({"task": self.task, **body}).encode())
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def initial_messages(self):
        return [{"role": "user", "content": "count to " + str(self.task)}]

    def list_tools(self):
        schema = {"type": "object", "properties": {"by": {"type": "integer"}}, "required": ["by"]}
        return [Has(name="increment", description="Add.", input_schema=schema)]

    def call_tool(self, name, arguments):
        return Has(**self._post("/" + name, **arguments))

    def verify(self, transcript, final_state):
        return Has(**self._post("/verify", transcript=transcript))

    def close(self):
        self._post("/close")

class Factory:
    def __init__(self, url):
        self.url = url

    def create(self, task, seed=None, episode_id=None):
        return Session(self.url, task)

def make(base_url):
    return Factory(base_url)
"""


@pytest.fixture
def server():
    """Its address, and what it was asked: it adds up, is done at 3, and has no reward for the task 9."""
    asked: list[tuple[str, dict]] = []
    totals: dict[int, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            if self.path == "/increment":
                is_bad = body["by"] < 0
                total = totals[body["task"]] = totals.get(body["task"], 0) + max(0, body["by"])
                error = "no steps back" if is_bad else None
                answer = {"data": {"total": total}, "done": total >= 3, "error": error}
            else:
                answer = {"env_reward": None if body["task"] == 9 else float(totals.get(body["task"], 0))}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None: ...

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", asked
    http.shutdown()
    http.server_close()


def test_a_session_is_an_episode(server, tmp_path):
    url, asked = server
    (tmp_path / "sessions.py").write_text(OWN)
    script = turns(*[f"{call('increment', by=by)}<|im_end|>" for by in (1, -1, 3, 1)], "done<|im_end|>")
    (three, nine), _ = play(
        script, environment="pgrpo.environments.openenv:OpenEnv", rows=[{"task": 3}, {"task": 9}],
        args={"factory": f"{tmp_path}/sessions.py:make", "options": {"base_url": url}},
    )  # fmt: skip
    assert three[0].prompt is not None and "count to 3<|im_end|>" in three[0].prompt.text
    told = [m["content"] for m in three[0].messages if m["role"] == "tool"]
    assert told == ["{'total': 1}", '{"error": "RuntimeError: no steps back"}', "{'total': 4}", "the episode is over"]
    assert three[0].own_rewards == {"OpenEnv": 4.0} and nine[0].own_rewards == {"OpenEnv": None}
    assert three[0].text == "done" and three[0].counts["failures"] == 1
    verified = next(body for path, body in asked if path == "/verify" and body["task"] == 3)
    assert [m["role"] for m in verified["transcript"]][:3] == ["user", "user", "assistant"]
    assert [path for path, _ in asked].count("/close") == 3  # two, and the one that listed the tools


REAL = """
from types import SimpleNamespace as Has
from openenv.core.client_types import StepResult
from openenv.core.env_server.mcp_types import Tool
from openenv.core.harness import ResourceSessionFactory, StepEnvSessionAdapter, ToolResult

SCHEMA = {"type": "object", "properties": {"by": {"type": "integer"}}, "required": ["by"]}

class Client:
    def reset(self, seed=None):
        self.total = 0
        return StepResult(observation="0", reward=None, done=False)

    def step(self, action):
        self.total += action
        return StepResult(observation=str(self.total), reward=self.total / 4, done=self.total >= 3)

    def state(self):
        return {"step_count": 1}

class Factory(ResourceSessionFactory):
    def create(self, task, seed=None, episode_id=None):
        return StepEnvSessionAdapter(
            Client(), task=task, seed=seed, tool_specs=[Tool(name="increment", description="Add.", input_schema=SCHEMA)],
            action_builder=lambda name, arguments: arguments["by"],
            initial_messages_builder=lambda result, task: [{"role": "user", "content": f"count to {task}"}],
            tool_result_builder=lambda name, arguments, result, state: ToolResult(data=result.observation, done=result.done),
        )

def make():
    return Factory()
"""


def test_an_adapter_of_the_package_itself_is_an_episode(tmp_path):
    if importlib.util.find_spec("openenv") is None:
        pytest.skip("OpenEnv is not installed")
    (tmp_path / "sessions.py").write_text(REAL)
    script = turns(*[f"{call('increment', by=by)}<|im_end|>" for by in (1, 2, 5)], "done<|im_end|>")
    ((three,),), _ = play(
        script, environment="pgrpo.environments.openenv:OpenEnv", rows=[{"task": 3, "seed": 1}],
        args={"factory": f"{tmp_path}/sessions.py:make"},
    )  # fmt: skip
    assert three.prompt is not None and "count to 3<|im_end|>" in three.prompt.text
    assert [m["content"] for m in three.messages if m["role"] == "tool"] == ["1", "3", "the episode is over"]
    assert three.own_rewards == {"OpenEnv": 0.75} and three.finish_reason == "stop"
