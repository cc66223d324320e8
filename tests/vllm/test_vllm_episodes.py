"""Episodes on the real engine: tools in worker processes, conversations that an environment leads, rewritten and branching
histories. What is trained on is what the engine read and wrote, token by token."""

from __future__ import annotations

import re
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from making import CALLER_TEMPLATE, save_caller
from transformers import AutoModelForCausalLM

from pgrpo.config import load_config
from pgrpo.config.sampling import sampling_params
from pgrpo.distributed.world import start
from pgrpo.environments.chat import Chat
from pgrpo.environments.parsing import Call, Reply
from pgrpo.rollout.base import sample_seeds
from pgrpo.training.build import build
from pgrpo.training.caller import Given

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
TOLERANCE = 0.1 if torch.cuda.is_available() else 1e-3
OWN = """
import os, random, time

class Caller:
    def reset(self, row, **_):
        self.row = row

    def f(self, n: int) -> str:
        '''Say the next number.

        Args:
            n: A number.
        '''
        time.sleep(random.random() / 20)
        if self.row == 0:
            os._exit(1)
        return str(n + 1)


class Led:
    async def converse(self, conversation):
        await conversation.generate()
        conversation.say("abc")
        other = await conversation.fork()
        await conversation.generate()
        await other.generate()
"""


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The groups of a rollout; what the engine read and wrote in each request; the untouched model; decodes ids."""
    folder = tmp_path_factory.mktemp("episodes")
    save_caller(folder / "model", hidden_size=128, head_dim=64)
    (folder / "own.py").write_text(OWN)
    rows = [{"row": i, "environment": ("caller", "led")[i % 2]} for i in range(6)]
    gpu = torch.cuda.is_available()
    config = load_config(
        {
            "run_dir": str(folder / "run"),
            "model": {"path": str(folder / "model"), "dtype": "bfloat16" if gpu else "float32"},
            "prompt": {
                "messages": [{"role": "user", "content": "{row}"}],
                # A message that is not the last is written in another way.
                "chat_template_kwargs": {
                    "chat_template": CALLER_TEMPLATE.replace(
                        "{{ m.content }}", "{{ m.content }}{% if not loop.last %}-{% endif %}"
                    )
                },
            },
            "data": {"max_prompt_tokens": 20},
            "environment": {
                "factory": {"caller": f"{folder}/own.py:Caller", "led": f"{folder}/own.py:Led"},
                "max_turns": 3, "max_episode_tokens": 120, "history": "fork",
            },
            "rollout": {
                "engine": "vllm", "enforce_eager": True, "prompts_per_step": 6, "group_size": 3, "max_completion_tokens": 14,
            },
            "train": {"steps": 1},
        },
        [],
        rewards_from_python=True, data_from_python=True,
    )  # fmt: skip
    given = Given(rewards=[lambda completions: [0.0] * len(completions)], dataset=rows)
    exchanged: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    with start() as world, build(config, world, given) as parts:
        engine, episodes = parts.engine, parts.episodes
        make: Any = engine._completions  # pyright: ignore[reportAttributeAccessIssue]

        def listen(output, params):
            exchanged.extend((tuple(output.prompt_token_ids), tuple(sample.token_ids)) for sample in output.outputs)
            return make(output, params)

        engine._completions = listen  # pyright: ignore[reportAttributeAccessIssue]
        prompts = sorted(parts.stream.take(6), key=lambda prompt: prompt.columns["row"])
        seeds = [sample_seeds(0, i, group_size=3) for i in range(6)]
        with engine.awake(0):
            groups = episodes.generate(prompts, sampling_params(config), seeds, 6, lambda *_: None)
        episodes.check(groups)
        yield groups, exchanged, AutoModelForCausalLM.from_pretrained(folder / "model"), engine.tokenizer.decode  # pyright: ignore[reportAttributeAccessIssue]
        episodes.release(groups)


def turns_of(sample) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All tokens in front of each turn, and its own."""
    found = []
    for turn in sorted(set(sample.turns) - {-1}):
        at = [i for i, number in enumerate(sample.turns) if number == turn]
        assert at == list(range(at[0], at[-1] + 1)) and all(sample.mask[i] for i in at)
        found.append(
            (tuple(sample.prompt_ids + sample.token_ids[: at[0]]), tuple(sample.token_ids[at[0] : at[-1] + 1]))
        )
    assert sum(len(ids) for _, ids in found) == sum(sample.mask)
    return found


def test_every_turn_is_what_the_engine_wrote_behind_what_is_trained_on(played):
    groups, exchanged, _, _ = played
    trained = [turn for group in groups for sample in group.samples for turn in turns_of(sample)]
    assert len(exchanged) > 30 and Counter(trained) == Counter(exchanged)


def test_the_log_probs_of_all_turns_are_those_of_the_untouched_model(played):
    groups, _, model, _ = played
    count = 0
    for sample in (sample for group in groups for sample in group.samples):
        with torch.no_grad():
            logprobs = model(torch.tensor([sample.prompt_ids + sample.token_ids])).logits[0].float().log_softmax(-1)
        for i, (token, is_sampled) in enumerate(zip(sample.token_ids, sample.mask, strict=True)):
            expected = logprobs[len(sample.prompt_ids) + i - 1, token].item() if is_sampled else 0.0
            assert sample.rollout_logprobs[i] == pytest.approx(expected, abs=TOLERANCE)
            count += is_sampled
    assert count > 300


def test_rewritten_histories_are_as_the_template_writes_them(played):
    groups, _, _, decode = played
    called = "<tool_call>f<arg_key>n</arg_key><arg_value>1</arg_value></tool_call><|im_end|>"
    seen = 0
    for group in groups[2::2]:
        for episode in group.episodes:
            texts = [decode(sample.prompt_ids + sample.token_ids) for sample in episode.samples]
            if len(texts) < 3 or not texts[0].endswith(called) or not texts[1].endswith(called):
                continue  # it answered, or wrote another call
            seen += 1
            row = group.prompt.columns["row"]
            assert texts[0] == f"f <|im_start|>{row}<|im_end|><|im_start|>{called}"
            history = f"f <|im_start|>{row}-<|im_end|><|im_start|>-{called}<|im_start|>2"
            assert texts[1].startswith(f"{history}<|im_end|><|im_start|>")
            assert texts[2].startswith(f"{history}-<|im_end|><|im_start|>-{called}<|im_start|>2<|im_end|><|im_start|>")
    assert seen >= 2


def test_branches_of_a_led_conversation_begin_with_the_same_history(played):
    groups, _, _, decode = played
    whole = [e for group in groups[1::2] for e in group.episodes if e.finish_reason == "stop" and len(e.samples) == 3]
    assert len(whole) >= 2
    for episode in whole:
        first, sequel, branch = episode.samples
        assert [m["role"] for m in episode.messages] == ["assistant", "user", "assistant", "environment", "assistant"]
        (_, said), (told, _), (told_branch, _) = (turns_of(sample)[-1] for sample in (first, sequel, branch))
        assert told == told_branch
        assert decode(told).endswith("-<|im_end|><|im_start|>abc<|im_end|><|im_start|>")
        said = decode(said).removesuffix("<|im_end|>")  # a call, but it has no tools: written again it is text
        assert f"<|im_start|>{re.sub('[<>/]', '<unk>', said)}-<|im_end|>" in decode(told)


def test_a_worker_that_dies_ends_its_episode_and_no_other(played):
    groups, _, _, _ = played
    calls = [e for e in groups[0].episodes if e.counts["calls"]]
    assert calls and all(e.finish_reason == "environment" for e in calls)
    assert all("its worker process ended" in e.messages[-1]["content"] for e in calls)
    others = [e for group in groups[1:] for e in group.episodes]
    assert {e.finish_reason for e in others} <= {"stop", "turns", "length"}


def test_an_episode_that_waits_for_its_tool_holds_no_slot(tmp_path):
    """One slot: the tool of the first episode returns once that of the other has been called twice, so the other has sampled two
    turns in between."""
    save_caller(tmp_path / "model", hidden_size=128, head_dim=64)
    second, calls = threading.Event(), Counter[str]()

    class Waits:
        def reset(self, who, **_):
            self.who = who

        def f(self, n: int) -> str:
            """Say a number.

            Args:
                n: A number.
            """
            calls[self.who] += 1
            if self.who == "first":
                assert second.wait(60)
            elif calls[self.who] == 2:
                second.set()
            return "2"

    config = load_config(
        {
            "run_dir": str(tmp_path / "run"),
            "model": {"path": str(tmp_path / "model"), "dtype": "bfloat16" if torch.cuda.is_available() else "float32"},
            "prompt": {
                "messages": [{"role": "user", "content": "1"}],
                "chat_template_kwargs": {"chat_template": CALLER_TEMPLATE},
            },
            "data": {"max_prompt_tokens": 20},
            "environment": {"max_turns": 3, "max_episode_tokens": 120},
            "rollout": {
                "engine": "vllm", "enforce_eager": True, "prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 14,
                "max_concurrent": 1,
            },
            "train": {"steps": 1},
        },
        [],
        rewards_from_python=True, data_from_python=True, environment_from_python=True,
    )  # fmt: skip
    rows = [{"who": "first"}, {"who": "other"}]
    given = Given(rewards=[lambda completions: [0.0] * len(completions)], dataset=rows, environment=Waits)
    with start() as world, build(config, world, given) as parts:
        prompts = sorted(parts.stream.take(2), key=lambda prompt: prompt.columns["who"])  # the first comes first
        # The model calls the tool in each turn, whatever it wrote.
        Chat.parse, parse = lambda *_: Reply("", "", [Call("f", {"n": 1})]), Chat.parse  # pyright: ignore
        try:
            with parts.engine.awake(0):
                groups = parts.episodes.generate(prompts, sampling_params(config), [[1], [2]], 2, lambda *_: None)
        finally:
            Chat.parse = parse
        parts.episodes.check(groups)
        assert [[e.finish_reason for e in group.episodes] for group in groups] == [["turns"], ["turns"]]
        assert calls == {"first": 3, "other": 3}
        parts.episodes.release(groups)
