"""Histories that the template rewrites begin another sample; environments that lead the conversation; values of turns."""

from __future__ import annotations

import asyncio
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from making import group
from playing import END, call, ids, play, thinking_tokenizer, turns
from transformers import AutoConfig

from pgrpo.admission.compare import difference, gradients, reference_logprobs
from pgrpo.admission.twins import True64, default_dtype, twins
from pgrpo.config import ConfigError, LossConfig
from pgrpo.environments.returns import give_returns, returns_to_go
from pgrpo.environments.tools import kind_of
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.types import Episode, Sample

THINKING = thinking_tokenizer()
ANSWERS = ["<think>so</think>one<|im_end|>", "<think>but</think>two<|im_end|>", "<think>well</think>three<|im_end|>"]


class Asks:
    """Speaks twice as the user, and judges by the last answer."""

    async def converse(self, conversation) -> None:
        self.heard = [await conversation.generate()]
        for text in ("more", "again"):
            conversation.say(text)
            self.heard.append(await conversation.generate())
        self.messages = conversation.messages

    def get_reward(self) -> float:
        return float(len(self.heard[-1].content))


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: One.
        b: The other.
    """
    return a + b


def shown(sample: Sample) -> list[tuple[bool, str]]:
    """The runs of a sample behind its prompt: whether they were sampled, and their text."""
    runs: list[tuple[bool, list[int]]] = []
    for token, sampled in zip(sample.token_ids, sample.mask, strict=True):
        if not runs or runs[-1][0] != sampled:
            runs.append((sampled, []))
        runs[-1][1].append(token)
    return [(sampled, THINKING.decode(tokens)) for sampled, tokens in runs]


def user(text: str) -> str:
    return f"\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_a_rewritten_history_is_another_sample_as_the_template_writes_it():
    ((episode,),), engine = play(turns(*ANSWERS), environment=Asks, tokenizer=THINKING)
    first, second, third = episode.samples
    prompt = "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"
    assert {THINKING.decode(s.prompt_ids) for s in episode.samples} == {prompt}
    assert first.prompt_ids is second.prompt_ids is third.prompt_ids
    assert shown(first) == [(True, ANSWERS[0])]
    assert shown(second) == [(False, f"one<|im_end|>{user('more')}"), (True, ANSWERS[1])]
    assert shown(third) == [
        (False, f"one<|im_end|>{user('more')}two<|im_end|>{user('again')}"), (True, ANSWERS[2])
    ]  # fmt: skip
    for sample, request in zip(episode.samples, engine.requests, strict=True):  # what the engine was shown
        assert request.token_ids == sample.prompt_ids + sample.token_ids[: sample.mask.index(True)]
        assert sample.rollout_logprobs == [-0.5 if sampled else 0.0 for sampled in sample.mask]
        assert request.continued == 0  # no turn before it was read like this
    assert [s.turns[-1] for s in episode.samples] == [0, 1, 2] and set(third.turns) == {-1, 2}
    assert episode.counts["rewritten"] == 2 and episode.own_rewards == {"Asks": 5.0}
    assert [m["content"] for m in episode.messages] == ["one", "more", "two", "again", "three"]
    assert (
        episode.environment.messages[0] == {"role": "user", "content": "go"} and len(episode.environment.messages) == 6
    )
    assert [(said.content, said.reasoning) for said in episode.environment.heard][1] == ("two", "but")


def test_what_still_runs_at_the_end_is_ended_with_its_loop():
    """Else the interpreter complains of a closed event loop when it ends."""
    left = []

    class Leaves:
        async def converse(self, conversation) -> None:
            left.append(asyncio.ensure_future(asyncio.sleep(600)))
            await conversation.generate()

    play(turns("ok<|im_end|>"), environment=Leaves)
    assert left[0].cancelled() and left[0].get_loop().is_closed()


def test_append_keeps_what_was_sampled():
    ((episode,),), engine = play(turns(*ANSWERS), environment=Asks, tokenizer=THINKING, history="append")
    (sample,) = episode.samples
    starts, count = [], len(sample.prompt_ids)
    for request in engine.requests:  # each goes on behind the turn before
        assert request.continued == (starts[-1] if starts else 0)
        starts.append(len(request.token_ids) + len(engine.said[request.seeds[0]][0]))
    assert starts[-1] == count + len(sample.token_ids)
    assert shown(sample) == [
        (True, ANSWERS[0]), (False, user("more")), (True, ANSWERS[1]), (False, user("again")), (True, ANSWERS[2])
    ]  # fmt: skip
    assert episode.counts["rewritten"] == 0


def test_results_of_tools_are_appended_and_forked_where_that_is_chosen_and_needed():
    script = turns(f"<think>so</think>{call('add', a=1)}<|im_end|>", "2<|im_end|>")
    for history in (None, "append", "fork"):  # the reasoning stays in a tool loop, so nothing is rewritten
        ((episode,),), _ = play(script, tools=[add], tokenizer=THINKING, history=history)
        assert len(episode.samples) == 1
    rewriting = thinking_tokenizer()
    rewriting.chat_template = rewriting.chat_template.replace("loop.index0 > last.user", "loop.last")
    for history, count in ((None, 1), ("append", 1), ("fork", 2)):
        ((episode,),), _ = play(script, tools=[add], tokenizer=rewriting, history=history)
        assert len(episode.samples) == count
    text = THINKING.decode(episode.samples[1].token_ids)
    assert text.startswith(
        '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>\n<|im_start|>user\n<tool_resp'
    )


def test_a_template_that_writes_the_prompt_in_another_way_shares_less():
    rewriting = thinking_tokenizer()
    rewriting.chat_template = "{% if messages|length > 2 %}long {% endif %}" + rewriting.chat_template
    ((episode,),), engine = play(turns(*ANSWERS), environment=Asks, tokenizer=rewriting)
    second = episode.samples[1]
    assert THINKING.decode(second.prompt_ids + second.token_ids).startswith("long <|im_start|>user\ngo<|im_end|>")
    assert engine.requests[1].token_ids == second.prompt_ids + second.token_ids[: second.mask.index(True)]


def test_what_the_model_wrote_never_becomes_a_control_token():
    evil = ids("<|im_end|>", THINKING)[0]
    ((episode,),), _ = play(
        turns("<think>a</think>x<tool_call>y<|im_end|>", *ANSWERS[1:]), environment=Asks, tokenizer=THINKING, tools=[]
    )
    context = [
        t for t, sampled in zip(episode.samples[1].token_ids, episode.samples[1].mask, strict=True) if not sampled
    ]
    assert context.count(evil) == 2 and ids("<tool_call>", THINKING)[0] not in context


def test_a_long_message_is_cut_or_ends_the_episode_when_forked():
    class Shouts(Asks):
        async def converse(self, conversation) -> None:
            self.heard = [await conversation.generate()]
            conversation.say("a" * 100_000)
            self.heard.append(await conversation.generate())

    ((episode,),), _ = play(turns(*ANSWERS), environment=Shouts, tokenizer=THINKING, turn=100, episode=400)
    assert episode.finish_reason == "stop" and len(episode.samples) == 2
    assert 200 < len(episode.samples[1].token_ids) <= 400
    assert "[the rest is cut]" in THINKING.decode(episode.samples[1].token_ids)
    options: dict[str, Any] = {"turn": 100, "episode": 400, "overlong": "end"}
    ((episode,),), _ = play(turns(*ANSWERS), environment=Shouts, tokenizer=THINKING, **options)
    assert episode.finish_reason == "length" and len(episode.samples) == 1


def test_a_template_that_can_neither_be_appended_to_nor_rendered_is_refused():
    silent = thinking_tokenizer()
    silent.chat_template = (
        "{% for m in messages %}{% if loop.first %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}<|im_start|>"
    )
    with pytest.raises(
        ConfigError, match=r"an answer behind reasoning and a user message: the turn does not end in one of"
    ):
        play(turns(*ANSWERS), environment=Asks, tokenizer=silent, history="fork")


class Branches:
    """Two answers of one history at the same time, then one more in the second branch."""

    def reset(self, **row) -> str:
        return "!"

    async def converse(self, conversation) -> None:
        await conversation.generate()
        conversation.say("more")
        other = await conversation.fork()
        answers = await asyncio.gather(conversation.generate(), other.generate())
        self.contents = [answer.content for answer in answers]
        other.say("again")
        await other.generate()
        conversation.end("turns")

    def get_turn_rewards(self) -> list[float]:
        return [1.0, 2.0, 0.0, 4.0]


PLAIN = ["one<|im_end|>", "two<|im_end|>", "three<|im_end|>", "four<|im_end|>"]


def spoken(text: str) -> str:
    spoken.count += 1  # pyright: ignore[reportFunctionMemberAccess]
    return PLAIN[(spoken.count - 1) % 4]  # pyright: ignore[reportFunctionMemberAccess]


def test_branches_share_their_history_and_train_it_once():
    spoken.count = 0  # pyright: ignore[reportFunctionMemberAccess]
    ((episode,),), _ = play(spoken, environment=Branches, tokenizer=THINKING)
    first, second = episode.samples
    assert shown(first) == [(True, PLAIN[0]), (False, user("more")), (True, PLAIN[1])]
    assert shown(second) == [
        (False, f"{PLAIN[0]}{user('more')}"), (True, PLAIN[2]), (False, user("again")), (True, PLAIN[3])
    ]  # fmt: skip
    assert episode.finish_reason == "turns" and episode.counts["turns"] == 4
    assert episode.environment.contents == ["two", "three"]
    assert [m["content"] for m in episode.messages] == [
        "one", "more", "two", "branch 1", "three", "again", "four"
    ]  # fmt: skip
    assert episode.own_rewards == {"Branches": 7.0} and episode.turn_rewards == [1.0, 2.0, 0.0, 4.0]
    assert Forest.of(episode.samples).rows < sum(len(s.prompt_ids + s.token_ids) for s in episode.samples)


def test_an_environment_may_speak_before_the_model_and_limits_reach_it():
    class First:
        async def converse(self, conversation) -> None:
            conversation.say({"role": "system", "content": "be brief"})
            self.ended = None
            try:
                while True:
                    await conversation.generate()
                    conversation.say("more")
            except Exception as limit:
                self.ended = limit.reason  # pyright: ignore[reportAttributeAccessIssue]

    ((episode,),), _ = play(turns(*PLAIN), environment=First, tokenizer=THINKING, max_turns=2)
    assert episode.environment.ended == "turns" == episode.finish_reason
    assert episode.prompt is not None and episode.prompt.text == (
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>assistant\n"
    )
    assert episode.samples[0].prompt_ids == episode.prompt.token_ids and episode.counts["turns"] == 2


@pytest.mark.parametrize("where", ["here", "worker"])
@pytest.mark.parametrize(
    ("body", "reason", "error"),
    [
        ("await conversation.generate(); raise OSError('gone')", "environment", "converse: OSError: gone"),
        ("await asyncio.sleep(60)", "timeout", "a call took longer than 1 s"),
        ("conversation.say(3)", "environment", "converse: ValueError: a message has a role and a content"),
        (
            "conversation.say('a' * 400); await conversation.generate()",
            "environment",
            "converse: with its text the prompt has",
        ),
        ("conversation.end('sleepy')", "environment", "converse: ValueError: 'sleepy' is no reason"),
        ("await conversation.generate(); conversation.say('more'); await conversation.generate()", "stop", None),
    ],
)
def test_what_a_led_conversation_does_wrong_ends_its_episode(tmp_path, where, body, reason, error):
    path: Path = tmp_path / "led.py"
    path.write_text(f"import asyncio\nclass Led:\n    async def converse(self, conversation):\n        {body}\n")
    made: Any = runpy.run_path(str(path))["Led"] if where == "here" else f"{path}:Led"
    ((episode,),), _ = play(
        turns(*ANSWERS), environment=made, tokenizer=THINKING, call_timeout_s=1.0 if reason == "timeout" else 60.0
    )
    assert episode.finish_reason == reason
    if error:
        assert error in episode.messages[-1]["content"]
    else:
        assert [m["content"] for m in episode.messages] == ["one", "more", "two"] and len(episode.samples) == 2


def test_a_worker_whose_branches_ask_together_when_a_limit_comes_gives_its_own_reward(tmp_path):
    path: Path = tmp_path / "led.py"
    path.write_text(
        "import asyncio\nclass Led:\n    async def converse(self, conversation):\n        await conversation.generate()\n"
        "        conversation.say('more')\n        other, third = await conversation.fork(), await conversation.fork()\n"
        "        await asyncio.gather(*(c.generate() for c in (conversation, other, third)))\n"
        "    def get_reward(self): return 0.25\n"
    )
    (episodes,), _ = play(turns("one<|im_end|>", "two"), environment=f"{path}:Led", tokenizer=THINKING, size=3)
    assert [(e.finish_reason, e.own_rewards) for e in episodes] == [("length", {"Led": 0.25})] * 3


def test_a_long_form_that_is_not_async_is_refused():
    class Sync:
        def converse(self, conversation) -> None: ...

    with pytest.raises(ConfigError, match=r"Sync.converse is not async; write `async def converse"):
        kind_of(Sync, {}, "environment.factory")


def test_log_probs_and_gradients_of_forked_episodes_equal_the_untouched_model():
    """In float64, one unpadded sample a call; the samples of an episode share what they begin with."""
    spoken.count = 0  # pyright: ignore[reportFunctionMemberAccess]
    (rewritten,), _ = play(turns(*ANSWERS), environment=Asks, tokenizer=THINKING, size=2)
    (branched,), _ = play(spoken, environment=Branches, tokenizer=THINKING)
    samples = [sample for episode in (*rewritten, *branched) for sample in episode.samples]
    small = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    config = AutoConfig.for_model("qwen3", vocab_size=len(THINKING), intermediate_size=48, **small)
    forest = Forest.of(samples)
    assert forest.rows < 0.6 * sum(len(s.prompt_ids + s.token_ids) for s in samples)
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float64):
        untouched, grouped = twins(config, 0)
    with True64():
        wanted = reference_logprobs(untouched, samples)
        got = difference(Policy(grouped), build_batch(forest), wanted, gradients(wanted, untouched))
    assert got.logprob < 1e-12 and got.gradient < 1e-12


def valued(reward: float | None, turn_rewards: list[float], turns: int) -> Episode:
    sample = Sample([1], [5] * (2 * turns), [True, False] * turns, [0.0] * (2 * turns))
    sample.turns = [n for t in range(turns) for n in (t, -1)]
    return Episode([sample], "", "stop", reward, counts={"turns": turns}, turn_rewards=turn_rewards)


def test_returns_to_go_are_compared_turn_by_turn():
    assert returns_to_go(valued(7.0, [1.0, 2.0], 3), 1.0) == [7.0, 6.0, 4.0]  # 4 is beyond the turns' values
    assert returns_to_go(valued(3.0, [1.0, 2.0], 2), 0.5) == [2.0, 2.0]
    assert returns_to_go(valued(6.0, [1.0, 2.0, 3.0], 2), 1.0) == [6.0, 5.0]  # more values than turns
    assert returns_to_go(valued(None, [1.0], 1), 1.0) == []
    episodes = [valued(4.0, [1.0, 3.0], 2), valued(2.0, [2.0, 0.0], 2), valued(1.0, [1.0], 1), valued(None, [], 2)]
    one = group([1], *episodes)
    give_returns([one], LossConfig(scale_advantages="none", turn_advantages="returns_to_go"))
    mean = (4 + 2 + 1) / 3
    got = [episode.samples[0].advantages for episode in episodes]
    assert got[0] == pytest.approx([4 - mean, 0.0, 3 - 1.5, 0.0]) and got[1] == pytest.approx([2 - mean, 0, 0 - 1.5, 0])
    assert got[2] == pytest.approx([1 - mean, 0.0]) and got[3] == [0.0] * 4
    give_returns([one], LossConfig())
    spread = math.sqrt(((4 - mean) ** 2 + (2 - mean) ** 2 + (1 - mean) ** 2) / 2) + 1e-4
    assert episodes[0].samples[0].advantages[0] == pytest.approx((4 - mean) / spread)


def test_a_last_turn_that_others_did_not_reach_has_no_advantage():
    long, short = valued(1.0, [], 2), valued(0.0, [], 1)
    give_returns([group([1], long, short)], LossConfig(scale_advantages="none"))
    assert long.samples[0].advantages == [0.5, 0.0, 0.0, 0.0] and short.samples[0].advantages == [-0.5, 0.0]


def test_the_end_token_is_that_of_the_tokenizer():
    assert END in ids("<|im_end|>", THINKING)
