"""Measures the effect of reward weights, dynamic sampling and the KL term: short runs of the quick start's model on a CPU, three
seeds each.

    python scripts/make_tiny_model.py
    python benchmarks/effects.py [--only weights,resampling,kl] [--steps 150] [--seeds 0,1,2] [--json benchmarks/effects.json]

- weights: two rewards that disagree on every sum below 100, exact match and "three digits", with weights 1 and 0, 0 and 1, 1 and 1.
- resampling: three of four rows have an answer that nothing matches, so that their groups never have spread.
- kl: kl_coef 0, 0.04 (preset grpo's) and 0.4.

The results are computed from a run's exported weights with plain transformers, on the held-out sums: the probability of the right
answer, which is the expected exact match at temperature 1; and the KL to the initial model in nats a token, computed from
complete distributions along sampled completions.
"""

from __future__ import annotations

import argparse
import json
import platform
import runpy
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import pgrpo
from pgrpo.commands.export import export

ROOT = Path(__file__).resolve().parents[1]
LAST = 30
"""Steps, at a run's end, whose mean is reported of what training logs."""
LIMIT = 4
"""Tokens of a completion, as in the recipe."""
WEIGHTS = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
RESAMPLE_LIMITS = (0, 10)
KL_COEFS = (0.0, 0.04, 0.4)
UNSOLVABLE = "none"


def variants(name: str) -> list[tuple[str, list[str], list[dict] | None]]:
    """What is compared: a label, overrides of quickstart.yaml, and rows in the place of the recipe's."""
    if name == "weights":
        three = "{function: format_regex, args: {pattern: '[0-9]{3}'}, weight: %g}"
        return [
            (
                f"weights {a:g}, {b:g}",
                [f"rewards.functions=[{{function: exact_match, weight: {a:g}}},{three % b}]"],
                None,
            )
            for a, b in WEIGHTS
        ]
    if name == "resampling":
        rows = [row | ({"answer": UNSOLVABLE} if i % 4 else {}) for i, row in enumerate(addition("train"))]
        return [(f"resample_limit {n}", [f"rollout.resample_limit={n}"], rows) for n in RESAMPLE_LIMITS]
    return [(f"kl_coef {c:g}", [f"loss.kl_coef={c:g}"], None) for c in KL_COEFS]


def addition(split: str) -> list[dict]:
    return runpy.run_path(str(ROOT / "recipes" / "addition.py"))["rows"](split)


def run(model: Path, seed: int, steps: int, overrides: list[str], rows: list[dict] | None) -> dict[str, Any]:
    """Train, and say what came out."""
    with tempfile.TemporaryDirectory() as folder:
        common = [f"model.path={model}", f"run_dir={folder}/run", f"seed={seed}", f"train.steps={steps}"]
        quiet = ["eval.every=0", "track.console=false", "track.completions=0"]
        begin = time.perf_counter()
        run_dir = pgrpo.train(str(ROOT / "configs" / "quickstart.yaml"), [*common, *quiet, *overrides], dataset=rows)
        seconds = time.perf_counter() - begin
        logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        trained = load(export(run_dir, Path(folder) / "model"))
    return {"seed": seed, "seconds": round(seconds, 1)} | measures(logged, trained, load(model), model)


def measures(logged: list[dict], trained: PreTrainedModel, initial: PreTrainedModel, model: Path) -> dict[str, float]:
    """Of a run's log, means over its last steps; of its weights, held-out numbers."""
    last = logged[-LAST:]
    found = {k: fmean(row[k] for row in last) for k in last[0] if k.startswith("rewards/") and k.endswith("/mean")}
    # With resampling the share without spread is that of what was sampled; the update's is logged apart.
    flat = "resampling/frac_reward_zero_std" if "resampling/groups" in last[0] else "frac_reward_zero_std"
    per_step = 32  # prompts; rollout.prompts_per_step of quickstart.yaml
    found["groups_with_spread"] = 1 - fmean(row[flat] for row in logged)
    found["groups_sampled_per_step"] = per_step + fmean(row.get("resampling/groups", 0.0) for row in logged)
    tokenizer, held_out = AutoTokenizer.from_pretrained(model), addition("eval")
    found["exact_match_before"] = exact_match(initial, tokenizer, held_out)
    found["exact_match"] = exact_match(trained, tokenizer, held_out)
    found["kl"] = kl(trained, initial, tokenizer, held_out)
    return {name: round(value, 4) for name, value in found.items()}


def load(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def exact_match(model: PreTrainedModel, tokenizer: Any, rows: list[dict]) -> float:
    """Mean probability of the right answer and its eos, which is what exact match is on average at temperature 1."""
    eos = tokenizer.eos_token
    texts = [f"{row['a']}+{row['b']}={row['answer']}{eos}" for row in rows]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    start = len("12+34=")
    logprobs = model(**ids).logits.log_softmax(-1)[:, start - 1 : -1]
    picked = logprobs.gather(-1, ids.input_ids[:, start:, None]).squeeze(-1)
    return torch.where(ids.attention_mask[:, start:].bool(), picked, 0.0).sum(-1).exp().mean().item()


@torch.no_grad()
def kl(model: PreTrainedModel, reference: PreTrainedModel, tokenizer: Any, rows: list[dict]) -> float:
    """KL(model || reference) of the next token's distribution, in nats, averaged over the tokens that the model samples."""
    torch.manual_seed(0)
    ids = tokenizer([f"{row['a']}+{row['b']}=" for row in rows], return_tensors="pt").input_ids
    running, total, tokens = torch.ones(len(ids), dtype=torch.bool), 0.0, 0
    for _ in range(LIMIT):
        ours, theirs = (m(ids).logits[:, -1].log_softmax(-1) for m in (model, reference))
        total += (ours.exp() * (ours - theirs)).sum(-1)[running].sum().item()
        tokens += int(running.sum())
        drawn = torch.multinomial(ours.exp(), 1)
        ids = torch.cat([ids, drawn], dim=1)
        running &= drawn.squeeze(-1) != tokenizer.eos_token_id
    return total / tokens


SHOWN = {
    "weights": ["rewards/exact_match/mean", "rewards/format_regex/mean"],
    "resampling": ["groups_with_spread", "groups_sampled_per_step", "exact_match_before", "exact_match"],
    "kl": ["kl", "exact_match_before", "exact_match"],
}


def show(name: str, results: dict[str, list[dict]]) -> None:
    """One row a variant: the mean over seeds, and each seed's number."""
    table = Table(title=name)
    for column in ("", *SHOWN[name]):
        table.add_column(column)
    for label, runs in results.items():
        cells = []
        for column in SHOWN[name]:
            values = [r[column] for r in runs]
            cells.append(f"{fmean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})")
        table.add_row(label, *cells)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "tiny_qwen3", help="default %(default)s")
    parser.add_argument("--only", default=",".join(SHOWN), help="default %(default)s")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--json", type=Path, help="write the numbers of every run here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"torch": torch.__version__, "machine": platform.machine(), "steps": args.steps}
    for name in args.only.split(","):
        results = {
            label: [run(args.model, int(seed), args.steps, overrides, rows) for seed in args.seeds.split(",")]
            for label, overrides, rows in variants(name)
        }
        show(name, results)
        report[name] = results
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
