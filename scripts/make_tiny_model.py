"""Make a 125,000-parameter Qwen3 that adds badly: the initial model of the CPU quick start.

A random model never samples a right sum, so GRPO would have nothing to reinforce. A short SUPERVISED WARM START (next-token
training on two-digit sums from the recipe's training split) teaches the format and brings sampled exact match to about 0.1.
Everything after that is learned by GRPO. Takes a few seconds; the same seed gives the same model.

    python scripts/make_tiny_model.py [--model qwen3] [--out .cache/tiny_qwen3] [--seed 0]
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "addition.py"
VOCABULARY = ["<pad>", "<eos>", *"0123456789+="]
WARM_START_STEPS, WARM_START_BATCH, WARM_START_LR = 120, 160, 2e-3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; a character outside the vocabulary raises. No bos token."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    # A window shorter than a sum, beside a full layer.
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    "gpt_oss": {
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 4,
        "num_experts_per_tok": 2, "intermediate_size": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True},
}  # fmt: skip
"""What each kind has beside the sizes that all have."""


def make_model(width: int = 64, layers: int = 2, kind: str = "qwen3") -> PreTrainedModel:
    """Random weights from torch's global generator."""
    sizes: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 32,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,  # with the usual 0.02 so narrow a model learns slowly at first, unlike from seed to seed
        "pad_token_id": VOCABULARY.index("<pad>"),
        "eos_token_id": VOCABULARY.index("<eos>"),
        "bos_token_id": None,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | MODELS[kind]))


def warm_start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict], steps: int = WARM_START_STEPS
) -> float:
    """Supervised next-token training on `a+b=sum<eos>`, loss on the sum only, in place; returns the last loss."""
    pad = VOCABULARY.index("<pad>")
    texts = [f"{row['a']}+{row['b']}={row['answer']}<eos>" for row in rows]
    ids_BT = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
    labels_BT = ids_BT.masked_fill(ids_BT == pad, -100)
    labels_BT[:, : len("12+34=")] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_START_LR)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        chosen = torch.randint(len(texts), (WARM_START_BATCH,))
        loss = model(input_ids=ids_BT[chosen], labels=labels_BT[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def sampled_exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> float:
    """Share of right answers, one sample a row at temperature 1. All prompts must have the same length."""
    inputs = tokenizer([f"{row['a']}+{row['b']}=" for row in rows], return_tensors="pt")
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=True, max_new_tokens=4
    )
    answers = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(answer == row["answer"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="qwen3", help="its kind (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/tiny_qwen3"), help="folder to write (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the batches (default %(default)s)")
    args = parser.parse_args()

    torch.set_num_threads(1)  # sums in the same order on every machine; more threads do not help at this size
    torch.manual_seed(args.seed)
    rows = runpy.run_path(str(RECIPE))["rows"]
    tokenizer, model = make_tokenizer(), make_model(kind=args.model)
    loss = warm_start(model, tokenizer, rows("train"))
    exact_match = sampled_exact_match(model.eval(), tokenizer, rows("eval"))
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(
        f"{args.out}: {model.num_parameters():,} parameters, "
        f"supervised warm start of {WARM_START_STEPS} steps (loss {loss:.3f} nats a token)"
    )
    print(f"sampled exact match on {len(rows('eval'))} held-out sums: {exact_match:.3f}")


if __name__ == "__main__":
    main()
