"""Make a tiny Qwen3-VL that guesses answers to questions about shapes: the initial model of configs/vision_quickstart.yaml.

A random model never answers in the right words, so GRPO would have nothing to reinforce. A short SUPERVISED WARM START teaches the
words: on questions of the recipe's training split, each with the ANSWER OF ANOTHER PICTURE. So the model answers in one of the four
ways that a question has, and is right by chance, in a quarter of the held-out questions. To see is learned by GRPO alone.

    python scripts/make_tiny_vision_model.py [--out .cache/tiny_vision] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
import runpy
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "shapes.py"
MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = [
    "how",
    "many",
    "shapes",
    "?",
    "which",
    "colour",
    "corner",
    "1",
    "2",
    "3",
    "4",
    "red",
    "green",
    "blue",
    "yellow",
    "top",
    "bottom",
    "left",
    "right",
    ":",
    "a",
]
VOCABULARY = ["<pad>", "<unk>", "<eos>", *MARKS, *WORDS]
TEMPLATE = """\
{%- for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ ':' }}{% endif %}"""
STEPS, BATCH, LR = 40, 64, 1e-3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word. No bos token."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # words with spaces between them
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", extra_special_tokens=MARKS,
        chat_template=TEMPLATE,
    )  # fmt: skip


def make_processor() -> Qwen2VLImageProcessorPil:
    """Pictures of 64 x 64 pixels as they are: 64 patches, 16 tokens. Mean and standard deviation are about those of the pictures:
    their ground is near zero then, and a shape is far from it."""
    return Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
        image_mean=[0.85] * 3, image_std=[0.25] * 3,
    )  # fmt: skip


def make_config() -> Qwen3VLConfig:
    ids = {word: VOCABULARY.index(word) for word in VOCABULARY}
    text = {
        "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "tie_word_embeddings": True, "initializer_range": 0.15, "pad_token_id": ids["<pad>"], "eos_token_id": ids["<eos>"],
        "bos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    }  # fmt: skip
    tower = {
        "depth": 2, "hidden_size": 48, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        "initializer_range": 0.1,
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text, vision_config=tower, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True,
    )  # fmt: skip


def make_model() -> Qwen3VLForConditionalGeneration:
    """Random weights. Positions of patches are as large as their contents, so that corners can be told apart from the beginning."""
    model = Qwen3VLForConditionalGeneration(make_config())
    torch.nn.init.normal_(model.model.visual.pos_embed.weight, std=0.5)
    return model


def exchanged(rows: list[dict]) -> list[str]:
    """The rows' answers, exchanged at random between rows with the same question: right words, that say nothing of the picture."""
    draw, places = random.Random("exchanged"), defaultdict[str, list[int]](list)
    for i, row in enumerate(rows):
        places[row["question"]].append(i)
    answers = [row["answer"] for row in rows]
    for own in places.values():
        for i, j in zip(own, draw.sample(own, len(own)), strict=True):
            answers[i] = rows[j]["answer"]
    return answers


def warm_start(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, rows: list[dict], steps: int
) -> float:
    """Supervised training on exchanged answers, in place; returns the last loss. All pictures have 16 tokens."""
    made = make_processor()([row["images"][0] for row in rows], return_tensors="pt")
    pixels, grids = made["pixel_values"].view(len(rows), -1, made["pixel_values"].shape[-1]), made["image_grid_thw"]
    pad, image = VOCABULARY.index("<pad>"), VOCABULARY.index("<|image_pad|>")
    prompts = [
        tokenizer(f"<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>{row['question']}:")["input_ids"]
        for row in rows
    ]
    answers = [tokenizer(answer + "<eos>")["input_ids"] for answer in exchanged(rows)]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids_BT = torch.full((len(rows), width), pad)
    labels_BT = torch.full((len(rows), width), -100)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids_BT[i, : len(p) + len(a)] = torch.tensor([*p, *a])
        labels_BT[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        chosen = torch.randint(len(rows), (BATCH,))
        ids = ids_BT[chosen]
        loss = model(
            input_ids=ids, labels=labels_BT[chosen], pixel_values=pixels[chosen].flatten(0, 1), image_grid_thw=grids[chosen],
            mm_token_type_ids=(ids == image).int(), attention_mask=(ids != pad).long(),
        ).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/tiny_vision"), help="folder (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the warm start (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums in the same order on every machine
    torch.manual_seed(args.seed)
    tokenizer, model = make_tokenizer(), make_model()
    loss = warm_start(model, tokenizer, runpy.run_path(str(RECIPE))["rows"]("train"), args.steps)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    make_processor().save_pretrained(args.out)
    print(json.dumps({"folder": str(args.out), "parameters": model.num_parameters(), "loss": round(loss, 3)}))


if __name__ == "__main__":
    main()
