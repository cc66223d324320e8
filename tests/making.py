"""Episodes and groups for tests; what a test does not name is filled in."""

from contextlib import nullcontext
from dataclasses import make_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.layout import PackedLayout
from pgrpo.config import Config
from pgrpo.distributed.world import World
from pgrpo.environments.episodes import SingleTurn
from pgrpo.rollout.vllm import start
from pgrpo.rollout.vllm.requests import EngineError
from pgrpo.types import Episode, FinishReason, Group, Prompt, Sample


def episode(
    token_ids,
    reward=None,
    *,
    mask=None,
    logprobs=None,
    advantage=None,
    finish_reason: FinishReason = "stop",
    text="",
    parts=None,
):
    """One sample of these tokens, behind a prompt that ``group`` gives it."""
    count = len(token_ids)
    advantages = [] if advantage is None else [advantage] * count
    sample = Sample([], token_ids, mask or [True] * count, logprobs or [0.0] * count, advantages=advantages)
    return Episode([sample], text, finish_reason, reward, parts or {})


def group(prompt, *episodes):
    """``prompt``: its tokens, or a ``Prompt``."""
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(0, "", prompt)
    for one in episodes:
        for sample in one.samples:
            sample.prompt_ids = prompt.token_ids
    return Group(prompt, list(episodes))


def flat_layout(prefix_lens, suffix_lens, device: str | torch.device = "cpu", choice=AttentionChoice()):
    """The layout of groups with these prompt lengths [N] and completion lengths [N][G]."""
    lengths = [*prefix_lens, *(n for group in suffix_lens for n in group)]
    parents = [-1 for _ in prefix_lens] + [i for i, group in enumerate(suffix_lens) for _ in group]
    return PackedLayout(lengths, parents, device, choice)


def generate(engine, prompts, params, seeds, on_group=lambda *_: None):
    """A group a prompt, with an episode of one turn for each of its seeds."""
    return SingleTurn(engine).generate(prompts, params, seeds, len(prompts), on_group)


CALL = [
    "<tool_call>",
    "f",
    "<arg_key>",
    "n",
    "</arg_key>",
    "<arg_value>",
    "1",
    "</arg_value>",
    "</tool_call>",
    "<|im_end|>",
]
CALLER_TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}"
    "</tool_call>{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def save_caller(folder, hidden_size=64, head_dim=16, kv_heads=1):
    """Save a Qwen3 and its tokenizer whose turns are mostly a call of ``f`` with ``n`` = 1: each token says the next one."""
    words = [*CALL, "<|im_start|>", "<pad>", "<unk>", *"0234567890+- abcdeghijklmopqrstuvwxyz{}[]:,.\"'_"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(".|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    marks = [word for word in vocabulary if word.startswith("<") and word not in ("<pad>", "<unk>")]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>",
        additional_special_tokens=marks, chat_template=CALLER_TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(vocabulary), hidden_size=hidden_size, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=512, tie_word_embeddings=False,
            pad_token_id=vocabulary["<pad>"], eos_token_id=vocabulary["<|im_end|>"], bos_token_id=None,
        )
    )  # fmt: skip
    with torch.no_grad():
        shown = torch.nn.functional.normalize(torch.randn(len(vocabulary), hidden_size), dim=-1)
        model.model.embed_tokens.weight.copy_(shown)
        model.lm_head.weight.mul_(0.1)
        for word, following in zip(["<|im_start|>", *CALL], CALL, strict=False):
            model.lm_head.weight[vocabulary[following]] += shown[vocabulary[word]]
    model.save_pretrained(folder)


def asked_of_vllm(monkeypatch: pytest.MonkeyPatch, config: Config, *, sleeps: bool = False) -> dict[str, Any]:
    """The options with which this config starts vLLM, of which nothing is needed and nothing starts."""
    asked: dict[str, Any] = {}

    def llm(**options: Any) -> None:
        asked.update(options)
        raise RuntimeError("enough")

    vllm = SimpleNamespace(
        LLM=llm, EngineArgs=make_dataclass("EngineArgs", []), SamplingParams=make_dataclass("SamplingParams", []),
        __version__="0.32.0",
    )  # fmt: skip
    monkeypatch.setattr(start, "inspect_model_here", lambda: None)
    for name in ("own_classes", "whole_files"):
        monkeypatch.setattr(start, name, nullcontext)
    monkeypatch.setattr(start, "package", lambda: vllm)
    with pytest.raises(EngineError, match="enough"):
        start.start(config, World(0, 1, torch.device("cpu")), 0.5, sleeps=sleeps)
    return asked
