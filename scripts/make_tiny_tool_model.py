"""Make a small Qwen3 that calls a calculator now and then: the initial model of configs/tools_quickstart.yaml.

A random model never writes a call, so GRPO would have nothing to reinforce. A short SUPERVISED WARM START on whole episodes
(question, call, result, answer) of the recipe's training split teaches the format; it is right in about a quarter of the held-out
problems then. What the tool says is not trained on. Everything after that is learned by GRPO.

    python scripts/make_tiny_tool_model.py [--out .cache/tiny_tools] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.chat_template_utils import get_json_schema

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "calculator.py"
MARKS = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
WORDS = ["system", "user", "assistant", "name", "arguments", "multiply", "tools"]
VOCABULARY = ["<pad>", "<unk>", *MARKS, *WORDS, *'0123456789abcdefghijklmnopqrstuvwxyz*+-=.,:;?!_"{}[]() \n']
TEMPLATE = """\
{%- if tools %}<|im_start|>system
tools: {% for tool in tools %}{{ tool.function.name }} {% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>' + message.content + '</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments|tojson + '}</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
STEPS, BATCH, LR = 220, 64, 3e-3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, a few words, and the marks of a chat. No bos token."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words = "|".join(WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{words}|.|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=MARKS,
        chat_template=TEMPLATE,
    )


def make_model() -> Qwen3ForCausalLM:
    """Random weights from torch's global generator."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=VOCABULARY.index("<pad>"),
        eos_token_id=VOCABULARY.index("<|im_end|>"),
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def episode(tokenizer: PreTrainedTokenizerFast, row: dict, tools: list[Any]) -> tuple[list[int], list[int]]:
    """Ids of a right episode, and labels: -100 on what the model only reads."""
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": row["a"], "b": row["b"]}}}
    messages = [
        {"role": "user", "content": f"{row['a']}*{row['b']}="},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": row["answer"]},
        {"role": "assistant", "content": row["answer"]},
    ]

    def ids(count: int, generate: bool) -> list[int]:
        text = tokenizer.apply_chat_template(
            messages[:count], tools=tools, tokenize=False, add_generation_prompt=generate
        )
        return tokenizer(str(text), add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]

    whole, labels = ids(4, False), [-100] * len(ids(4, False))
    for first, last in ((len(ids(1, True)), len(ids(2, False))), (len(ids(3, True)), len(whole))):
        labels[first : last - 1] = whole[first : last - 1]  # to the end of the turn; not the newline behind it
    return whole, labels


def warm_start(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> float:
    """Supervised training on right episodes, in place; returns the last loss."""
    tools = [get_json_schema(runpy.run_path(str(RECIPE))["multiply"])]
    episodes = [episode(tokenizer, row, tools) for row in rows]
    width = max(len(ids) for ids, _ in episodes)
    pad = VOCABULARY.index("<pad>")
    ids_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in episodes])
    labels_BT = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in episodes])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loss = torch.tensor(0.0)
    for _ in range(STEPS):
        chosen = torch.randint(len(episodes), (BATCH,))
        loss = model(input_ids=ids_BT[chosen], labels=labels_BT[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/tiny_tools"), help="folder (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in the same order on every machine
    torch.manual_seed(args.seed)
    tokenizer, model = make_tokenizer(), make_model()
    loss = warm_start(model, tokenizer, runpy.run_path(str(RECIPE))["rows"]("train"))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"folder": str(args.out), "parameters": model.num_parameters(), "loss": round(loss, 3)}))


if __name__ == "__main__":
    main()
