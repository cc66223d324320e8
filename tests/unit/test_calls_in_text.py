"""Calls in what models write: every family's format, well-formed and not; and the real chat templates, where TRL's are installed.

TRL ships the templates of many models as files: ``pip install --no-deps trl`` for these tests. Nothing of TRL is imported.
"""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pgrpo.config import ConfigError
from pgrpo.config.task import EnvironmentConfig
from pgrpo.data.control import MARK, Control
from pgrpo.environments.chat import Chat, call_id
from pgrpo.environments.conversation import Lengths, Transcript
from pgrpo.environments.parsing import FAMILIES
from pgrpo.environments.transitions import check_transitions
from pgrpo.types import Completion, Prompt, Request

HERMES, XML, GLM, LLAMA, HARMONY, GEMMA, LFM = FAMILIES.values()
GOOD = '<tool_call>\n{"name": "f", "arguments": {"x": 7}}\n</tool_call>'


def read(parse, text: str, is_thinking: bool = False):
    """(content, reasoning, calls as (name, arguments) or the beginning of the error)."""
    reply = parse(text, is_thinking)
    return reply.content, reply.reasoning, [(c.error or "")[:12] or (c.name, dict(c.arguments)) for c in reply.calls]


F = ("f", {"x": 7})


@pytest.mark.parametrize(
    ("parse", "text", "wanted"),
    [
        (HERMES, GOOD, ("", "", [F])),
        (HERMES, f"a {GOOD} b {GOOD}", ("a  b", "", [F, F])),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', ("", "", [("f", {})])),
        (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 7}"}</tool_call>', ("", "", [F])),
        (HERMES, '<tool_call>{"name": "f", </tool_call>' + GOOD, ("", "", ["not JSON: Ex", F])),
        (HERMES, '<tool_call>{"name": "f", "arguments": {"x": 7}}', ("", "", ["</tool_call>"])),
        (HERMES, "<tool_call>[1]</tool_call>", ("", "", ["not a JSON o"])),
        (HERMES, f"<think>{GOOD}</think>no", ("no", GOOD, [])),
        (HERMES, f"<think>{GOOD}", ("", GOOD, [])),
        (HERMES, "five", ("five", "", [])),
        (
            XML,
            "<tool_call>\n<function=f>\n<parameter=x>\n7\n</parameter>\n<parameter=s>\na\nb\n</parameter>\n</function>\n</tool_call>",
            ("", "", [("f", {"x": "7", "s": "a\nb"})]),
        ),
        (XML, "<tool_call><function=f><parameter=x>7</function></tool_call>", ("", "", ["a parameter "])),
        (XML, "<tool_call><function=f></tool_call>", ("", "", ["no <function"])),
        (
            GLM,
            "<think></think>\n<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>7</arg_value>\n</tool_call>",
            ("", "", [("f", {"x": "7"})]),
        ),
        (GLM, "<tool_call>f\n<arg_key>x</arg_key></tool_call>", ("", "", ["an argument "])),
        (LLAMA, '{"name": "f", "parameters": {"x": 7}}', ("", "", [F])),
        (LLAMA, '<|python_tag|>{"name": "f", "arguments": {"x": 7}}; {"name": "f", "parameters": {}}', ("", "", [F, ("f", {})])),
        (LLAMA, '{"name": "f", "parameters": {"x": }}', ("", "", ["not JSON: Ex"])),
        (LLAMA, "{1, 2} is a set", ("{1, 2} is a set", "", [])),
        (HARMONY, ' to=functions.f<|channel|>commentary json<|message|>{"x": 7}', ("", "", [F])),
        (
            HARMONY,
            '<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json'
            '<|message|>{"x": 7}',
            ("", "hm", [F]),
        ),
        (HARMONY, "<|channel|>final<|message|>five", ("five", "", [])),
        (HARMONY, " to=functions.f<|channel|>commentary json<|message|>{", ("", "", ["not JSON: Ex"])),
        (
            GEMMA,
            '<|tool_call>call:f{x:7,s:<|"|>a,{b}<|"|>,l:[1,<|"|>c<|"|>],d:{k:null,e:true}}<tool_call|>',
            ("", "", [("f", {"x": 7, "s": "a,{b}", "l": [1, "c"], "d": {"k": None, "e": True}})]),
        ),
        (GEMMA, "<|tool_call>call:f{x:}<tool_call|>", ("", "", ["'' is no val"])),
        (GEMMA, "<|tool_call>call:f{}<tool_call|>", ("", "", [("f", {})])),
        (LFM, "<|tool_call_start|>[f(x=7), g(s='a')]<|tool_call_end|>ok", ("ok", "", [F, ("g", {"s": "a"})])),
        (LFM, "<|tool_call_start|>[f(x=open('a'))]<|tool_call_end|>", ("", "", ["malformed no"])),
    ],
)  # fmt: skip
def test_a_turn_in_parts(parse, text, wanted):
    assert read(parse, text) == wanted


def test_a_turn_behind_an_open_thought():
    assert read(HERMES, f"hm {GOOD}", is_thinking=True) == ("", f"hm {GOOD}", [])
    assert read(HERMES, f"hm</think>{GOOD}", is_thinking=True) == ("", "hm", [F])


# Real templates: their ends of a turn, the family of their calls, and which transitions rewrite what was said.
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|python_tag|>",
    "<|start|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<|channel|>",
    "<|message|>",
    "<|constrain|>",
    "<turn|>",
    "<|turn>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
]
IM = ["<|im_end|>", "<|endoftext|>"]
QWEN = "\n<|im_start|>user\n<tool_response>\nRES\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
REAL = {
    "qwen2_5": (IM, HERMES, QWEN, "....."),
    "qwen3_instruct_2507": (IM, HERMES, QWEN, "....."),
    "qwen3": (IM, HERMES, QWEN, "r.rrr"),
    "qwen3_5_think": (IM, XML, QWEN + "<think>\n", "...rr"),
    "qwen3_6": (IM, XML, QWEN + "<think>\n", "...rr"),
    "qwen3_8": (IM, XML, QWEN + "<think>\n", "....."),
    "llama3_1": (
        ["<|eot_id|>", "<|eom_id|>"], LLAMA,
        '<|start_header_id|>ipython<|end_header_id|>\n\n"RES"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n', "..x..",
    ),
    "gptoss": (
        ["<|call|>", "<|return|>"], HARMONY,
        '<|start|>functions.f to=assistant<|channel|>commentary<|message|>"RES"<|end|><|start|>assistant', "...x.",
    ),
    "gemma4_v5": (
        ["<turn|>", "<|tool_response>"], GEMMA, 'response:f{value:<|"|>RES<|"|>}<tool_response|>', "...rr",
    ),
    "glm4moe": (
        ["<|endoftext|>", "<|user|>", "<|observation|>"], GLM, "\n<tool_response>\nRES\n</tool_response><|assistant|>", "...rr",
    ),
    "lfm2_v2": (
        IM, LFM,
        "\n<|im_start|>tool\n<|tool_response_start|>RES<|tool_response_end|><|im_end|>\n<|im_start|>assistant\n", ".....",
    ),
}  # fmt: skip
REFUSED = {
    "smolvlm": "does not render calls of tools",
    "llama3": "leaves out calls or results of tools",
    "muse_glimmer": "writes calls in a format that pgrpo cannot read",
}
SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f", "description": "F.",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer", "description": "X."}}, "required": ["x"]},
    },
}  # fmt: skip


def byte_tokenizer(template: str) -> Any:
    """A token a byte, and the marks of all families."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<bos>")
    made.add_special_tokens({"additional_special_tokens": MARKS})  # pyright: ignore[reportArgumentType]
    made.chat_template = template
    return made


def trl_template(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("TRL, whose files these are, is not installed")
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text()


@pytest.mark.parametrize("name", REAL)
def test_real_templates_between_two_turns(name):
    ends, family, between, transitions = REAL[name]
    tokenizer = byte_tokenizer(trl_template(name))
    chat = Chat(tokenizer, tokenizer.convert_tokens_to_ids(ends), [SCHEMA], {})
    found = check_transitions(chat, "tools")
    assert chat.family is family
    assert "".join("x" if t.problem else "r" if t.rewrites else "." for t in found) == transitions
    result = {"role": "tool", "name": "f", "tool_call_id": call_id(0), "content": "RES"}
    end, written = chat.told(["f"], [result])
    assert tokenizer.convert_ids_to_tokens(end) in ends
    assert tokenizer.decode(written.ids) == between
    two = tokenizer.decode(chat.told(["f", "f"], [result, {**result, "content": "ANOTHER"}])[1].ids)
    assert two.index("RES") < two.index("ANOTHER") and two.endswith(between[between.index("RES") + 4 :][-8:])


@pytest.mark.parametrize("name", REFUSED)
def test_a_real_template_without_tools_is_refused(name):
    tokenizer = byte_tokenizer(trl_template(name))
    with pytest.raises(ConfigError, match=REFUSED[name]):
        check_transitions(Chat(tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")], [SCHEMA], {}), "tools")


HAND_MADE = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{"name": "{{ c.function.name }}", "arguments": \
{{ c.function.arguments|tojson }}}</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_a_hand_made_template_and_one_whose_turns_have_no_end():
    tokenizer = byte_tokenizer(HAND_MADE)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = Chat(tokenizer, [end], [SCHEMA], {})
    assert [t.problem or t.rewrites for t in check_transitions(chat, "tools")] == [None] * 5
    assert chat.family is HERMES
    other = Chat(tokenizer, [tokenizer.convert_tokens_to_ids("<|eot_id|>")], [SCHEMA], {})
    with pytest.raises(ConfigError, match=r"a call and its result: the turn does not end in one of .*<\|eot_id\|>"):
        check_transitions(other, "tools")
    assert check_transitions(other, "tools", "fork")[
        0
    ].can_fork  # the history can be rendered, so each turn begins a sample
    with pytest.raises(ConfigError, match=r"environment\.history=fork"):
        check_transitions(other, "tools", "append")


def test_a_tokenizers_own_response_template_comes_first():
    tokenizer = byte_tokenizer(HAND_MADE)
    calls = []

    def parse_response(ids, prefix, tools):
        calls.append((ids, prefix, tools))
        if not ids:
            raise ValueError("nothing  to\nread")
        return {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 7}}}]}

    tokenizer.response_template, tokenizer.parse_response = {"any": 1}, parse_response  # pyright: ignore
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat = Chat(tokenizer, [end], [SCHEMA], {})
    check_transitions(chat, "tools")
    reply = chat.parse([5, 6, end], [1, 2])
    assert (reply.content, [(c.name, c.arguments) for c in reply.calls]) == ("c", [F])
    assert calls == [([5, 6], [1, 2], [SCHEMA])]
    assert [c.error for c in chat.parse([end], [1]).calls] == ["nothing to read"]


@pytest.mark.parametrize(
    "text", ["", "plain", "a<|im_end|>b", "<|im_end|><|im_start|>", "<<|im_end|>", "ünï<think>", MARK]
)
def test_guarded_text_has_no_control_token_and_decodes_to_itself(text):
    tokenizer = byte_tokenizer(HAND_MADE)
    control = Control(tokenizer, special_only=False)
    ids = control.encode(control.guard(text))
    assert not [t for t in ids if t in tokenizer.added_tokens_decoder]
    assert tokenizer.decode(ids) == text.replace(MARK, "")
    if "<" not in text:
        assert ids == tokenizer(text.replace(MARK, ""), add_special_tokens=False)["input_ids"]


def said_in(chat: Chat, turns: list[str], told: list[dict[str, Any]]) -> Transcript:
    """A conversation of these turns of the model, with a message in between; its history is forked where it is rewritten."""
    tokenizer, waiting = chat.tokenizer, iter(turns)

    async def complete(request: Request) -> Completion:
        ids = tokenizer(next(waiting), add_special_tokens=False)["input_ids"]
        return Completion(ids, [-0.5] * len(ids), "stop", "", 0)  # pyright: ignore

    async def talk() -> Transcript:
        messages = [{"role": "user", "content": "go"}]
        written = chat.prompt_with(messages, [])
        prompt = Prompt(0, written.text, written.ids, {}, messages)
        transcript = Transcript(prompt, 0, chat, EnvironmentConfig(history="fork"), Lengths(500, 5000), complete)
        for message in told:
            reply = await transcript.generate()
            transcript.answer(0, "f", message["content"]) if reply.calls else transcript.say(message)
        await transcript.generate()
        return transcript

    return asyncio.run(talk())


CALLED = {
    "qwen3": '<think>\nlook\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"x": 3}}\n</tool_call><|im_end|>',
    "gptoss": (
        "<|channel|>analysis<|message|>look<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>"
        '{"x": 3}<|call|>'
    ),
}
FORKS = {
    "qwen3": (
        "<think>\n{0}\n</think>\n\n{1}<|im_end|>",
        "<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
        '<tool_call>\n{"name": "f", "arguments": {"x": 3}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\nRES\n'
        "</tool_response><|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gptoss": (
        "<|channel|>analysis<|message|>{0}<|end|><|start|>assistant<|channel|>final<|message|>{1}<|return|>",
        "<|start|>user<|message|>go<|end|><|start|>assistant<|channel|>final<|message|>4<|end|><|start|>user<|message|>more<|end|>"
        "<|start|>assistant",
        '<|start|>assistant to=functions.f<|channel|>commentary json<|message|>{"x": 3}<|call|><|start|>functions.f to=assistant'
        '<|channel|>commentary<|message|>"RES"<|end|><|start|>assistant<|channel|>final<|message|>4<|end|><|start|>user<|message|>'
        "more<|end|><|start|>assistant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORKS)
def test_forks_of_real_templates_are_what_a_server_renders(name):
    """The old reasoning is gone in the second sample, and what is left is what the template makes of the messages."""
    ends = REAL[name][0]
    answer, after_answer, after_call = FORKS[name]
    tokenizer = byte_tokenizer(trl_template(name))
    chat = Chat(tokenizer, tokenizer.convert_tokens_to_ids(ends), [SCHEMA], {})
    check_transitions(chat, "tools", "fork", is_led=True)
    user, last = {"role": "user", "content": "more"}, answer.format("now", "5")
    for turns, told, tail, samples in (
        ([answer.format("easy", "4"), last], [user], after_answer, 2),
        ([CALLED[name], answer.format("so", "4"), last], [{"content": "RES"}, user], after_call, None),
    ):
        said = said_in(chat, turns, told)
        sample = said.sample
        assert samples is None or len(said.samples) == samples
        whole = sample.prompt_ids + sample.token_ids
        context = whole[: len(sample.prompt_ids) + sample.mask.index(True)]
        assert tokenizer.decode(context).endswith(tail)
        server = tokenizer.apply_chat_template(
            [{"role": "user", "content": "go"}, *[_thinking(m) for m in said.messages[:-1]]], tools=[SCHEMA], tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        assert context == tokenizer(server, add_special_tokens=False)["input_ids"]
        assert (
            tokenizer.decode([t for t, sampled in zip(sample.token_ids, sample.mask, strict=True) if sampled]) == last
        )


def _thinking(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "thinking": message["reasoning_content"]} if "reasoning_content" in message else message
