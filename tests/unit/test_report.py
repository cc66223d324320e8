"""The HTML page of a run: what is in it, what it leaves out and says so, and that nothing hostile gets out of its place."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pgrpo.commands import report
from pgrpo.commands.plot import plot
from pgrpo.config import ConfigError, load_config, to_yaml

STEAL = "document.title='owned'"
HOSTILE = f'</td></script><script>{STEAL}</script><!--&lt;\x1b[2J\u202e<img src=http://x.y/z onerror="{STEAL}">'
SHOWN = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
VOID = {"meta", "input", "br", "img", "link"}


class Page(HTMLParser):
    """Elements in order, with their text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(self.elements[-1][2])

    def handle_endtag(self, tag):
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        for texts in self.open:
            texts.append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(texts)) for name, attributes, texts in self.elements if name == tag]

    @property
    def data(self) -> dict:
        (text,) = (text for attributes, text in self.all("script") if attributes.get("id") == "data")
        return json.loads(text)


def sample(step: int, text: str = "2", reward: float | None = 1.0, **more) -> dict:
    row = {"step": step, "prompt": f"{step}+", "completion": text, "reward": reward, "parts": {"exact": reward}}
    return row | {"advantage": 0.5, "finish_reason": "stop"} | more


def metrics(step: int) -> dict:
    return {"step": step, "reward": step / 10, "rewards/exact/mean": step / 10, "entropy": None if step == 2 else 1.0}


def write(folder: Path, rows: list[dict], completions: list[dict], config: str = "model:\n  path: m\n") -> Path:
    folder.mkdir(parents=True)
    for name, lines in (("metrics", rows), ("completions", completions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(config)
    return folder


def page_of(run: Path) -> Page:
    _, file = plot(run)
    assert file == run / "report.html"
    return Page(file.read_text(encoding="utf-8"))


def test_curves_and_completions_of_training_and_evaluations(tmp_path):
    run = write(tmp_path / "run", [metrics(s) for s in range(4)], [sample(1), sample(3, "5", None, advantage=None)])
    (run / "eval" / "step_2").mkdir(parents=True)
    held_out = [{"mode": mode, **sample(9, "7"), "index": 4, "tokens": 2} for mode in ("sampled", "greedy")]
    for row in held_out:
        del row["step"], row["advantage"]
    (run / "eval" / "step_2" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    data = page_of(run).data
    assert data["series"]["reward"] == [[0, 1, 2, 3], [0.0, 0.1, 0.2, 0.3]]
    assert data["series"]["entropy"] == [[0, 1, 3], [1.0] * 3]
    reward, entropy = data["panels"]
    assert (reward["title"], reward["names"]) == ("Reward", ["reward"])  # the other is equal: one curve, both names
    assert reward["labels"] == {"reward": "reward = rewards/exact/mean"} and entropy["names"] == ["entropy"]
    assert data["prompts"] == ["1+", "3+", "9+"] and data["parts"] == ["exact"]
    assert data["samples"] == [
        [0, 1, 0, "2", 1.0, [1.0], 0.5, "stop"],
        [0, 3, 1, "5", None, [None], None, "stop"],
        [1, 2, 2, "7", 1.0, [1.0], None, "stop"],
        [2, 2, 2, "7", 1.0, [1.0], None, "stop"],
    ]
    assert data["sources"] == ["training", "held out, sampled", "held out, greedy"]
    assert data["tiles"][0] == {
        "label": "mean reward", "value": "0 → 0.3", "note": "first and last twentieth of the steps"
    }  # fmt: skip


def test_page_is_self_contained_and_what_a_model_wrote_is_only_data(tmp_path):
    row = sample(3, HOSTILE, parts={HOSTILE: 1.0}, prompt=HOSTILE, finish_reason=HOSTILE)
    run = write(tmp_path / "<i>run", [metrics(3) | {HOSTILE: 1.0}], [row], f"model:\n  path: {HOSTILE}\n")
    page = page_of(run)
    names = [name for name, _, _ in page.elements]
    assert names.count("script") == 2 and not {"img", "link", "iframe", "i", "base", "object"} & set(names)
    attributes = [(name, value) for _, own, _ in page.elements for name, value in own.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("src", "href", "action", "style")]
    (policy,) = (own["content"] for own, _ in page.all("meta") if "http-equiv" in own)
    ((_, style),), ((_, _), (kind, script)) = page.all("style"), page.all("script")
    assert not kind
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    assert (
        policy == f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; img-src data:"
    )
    assert not re.search(r"url\(|@import", style)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(|fetch|XMLHttp|import", script
    )
    assert page.data["samples"] == [[0, 3, 0, SHOWN, 1.0, [1.0], 0.5, SHOWN]]
    assert page.data["prompts"] == page.data["parts"] == [SHOWN] and SHOWN in page.data["series"]
    assert page.all("title")[0][1] == page.all("h1")[0][1] == "<i>run"
    assert SHOWN in page.all("pre")[0][1]


def test_lines_and_tabs_stay_and_what_cannot_be_seen_is_escaped(tmp_path):
    run = write(tmp_path / "run", [metrics(1)], [sample(1, "if x:\n\treturn\r\x00\udc80é")])
    assert page_of(run).data["samples"][0][3] == "if x:\n\treturn\\r\\x00\\udc80é"


def test_secrets_are_not_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_SECRET", "sk-from-environment")
    config = load_config("quickstart", [
        "rewards.functions=[{function: llm_judge, args: {api_key: sk-in-the-file, model: '${oc.env:JUDGE_SECRET}'}}]"
    ])  # fmt: skip
    run = write(tmp_path / "run", [metrics(1)], [sample(1)], to_yaml(config))
    text = (run / "report.html", plot(run))[0].read_text(encoding="utf-8")
    assert "sk-" not in text and text.count("(redacted)") == 2


def test_a_large_run_is_cut_and_the_page_says_how(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_POINTS", 10)
    monkeypatch.setattr(report, "MAX_SAMPLES", 12)
    monkeypatch.setattr(report, "MAX_CHARACTERS", 12 * 2 * 500)
    completions = [sample(s, "x" * (700 if s == 20 else 5) + f"{s}.{i}") for s in range(1, 21) for i in range(3)]
    run = write(tmp_path / "run", [metrics(s) for s in range(1, 26)], completions)
    page = page_of(run)
    steps, values = page.data["series"]["reward"]
    assert steps == [3, 6, 9, 12, 15, 18, 21, 24, 25]
    assert values == pytest.approx([0.2, 0.5, 0.8, 1.1, 1.4, 1.7, 2.0, 2.3, 2.5])
    samples = page.data["samples"]
    assert [s[1] for s in samples] == [5, 5, 5, 10, 10, 10, 15, 15, 15, 20, 20, 20]
    assert samples[-1][3] == "[204 characters left out] " + "x" * 496 + "20.2"
    assert [text for own, text in page.all("p") if own.get("class") == "note"][1:] == [  # the first is for noscript
        "Curves: means over 3 steps each; metrics.jsonl has every step.",
        "The table holds 12 of 60 rows of completions.jsonl, those of 4 of 20 steps; the file has all.",
        "3 texts of completions.jsonl are cut to their last 500 characters; the file has all of them.",
    ]


def test_a_step_with_more_than_a_page_holds_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MAX_SAMPLES", 4)
    run = write(tmp_path / "run", [metrics(1)], [sample(s, str(i)) for s in (1, 2) for i in range(10)])
    assert [s[1:4:2] for s in page_of(run).data["samples"]] == [[2, "0"], [2, "3"], [2, "6"], [2, "9"]]


def test_a_broken_file_is_named(tmp_path):
    run = write(tmp_path / "run", [metrics(1)], [sample(1)])
    (run / "completions.jsonl").write_text("noise\n")
    with pytest.raises(ConfigError, match=r"completions\.jsonl, line 1: not a row of a run"):
        plot(run)
    assert not (run / "report.html").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser: apt-get install chromium")
def test_in_a_browser(tmp_path):
    """The page's own script runs, under its policy, and nothing else does."""
    rows = [metrics(s) for s in range(1, 4)]
    run = write(tmp_path / "run", rows, [sample(s, HOSTILE, prompt=HOSTILE) for s in range(1, 61)])
    plot(run)
    shell = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [*shell, "--virtual-time-budget=5000", "--dump-dom", f"file://{run / 'report.html'}"]
    page = Page(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)
    assert page.all("title")[0][1] == "run"
    assert "img" not in [name for name, _, _ in page.elements] and len(page.all("script")) == 2
    assert len(page.all("svg")) == 2
    cells = [text for own, text in page.all("td") if own.get("data-label") == "completion"]
    assert cells == [SHOWN] * 50  # the first page of 60
    assert [text for own, text in page.all("td") if own.get("data-label") == "step"] == [
        str(s) for s in range(60, 10, -1)
    ]
    assert page.all("nav")[0][1].split("page ")[1].startswith("1 of 2")


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs a browser: apt-get install chromium")
def test_a_click_shows_the_group_side_by_side_and_unfolds_the_shared_beginning(tmp_path):
    """In a copy without the policy, which lets a script of the test click."""
    head = "a system prompt that all of these prompts share\n"
    samples = [sample(s, f"{s}.{i}", reward=float(i), prompt=f"{head}{s}+1=") for s in (1, 2) for i in range(3)]
    run = write(tmp_path / "run", [metrics(s) for s in (1, 2)], samples)
    plot(run)
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", (run / "report.html").read_text())
    click = '<script>document.querySelectorAll("#table tbody tr")[1].click()</script></body>'
    (tmp_path / "copy.html").write_text(text.replace("</body>", click))
    shell = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [*shell, "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'copy.html'}"]
    page = Page(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)
    side = [text for own, text in page.all("article") if own.get("class") in ("", "own")]
    assert [text.split("stop")[1] for text in side] == ["2.2", "2.1", "2.0"]  # the step of the row, best first
    prompts = [text for own, text in page.all("td") if own.get("data-label") == "prompt"]
    assert prompts[0] == f"[{len(head)} shared characters] {head}2+1="
    assert [own.get("class") for own, _ in page.all("tr")].count("open") == 1
