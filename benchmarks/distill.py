"""On-policy distillation of the quick start's model from a larger one that adds well: exact match and KL over steps.

The teacher is six times as large and trained on sums until it is right nearly always. Both forms of the KL without a reward (exact
match is logged with weight 0), and one with it; each with three seeds. About eleven minutes of one CPU core.

    python benchmarks/distill.py [--out benchmarks/distill.json]
"""

from __future__ import annotations

import argparse
import json
import runpy
import tempfile
from pathlib import Path
from typing import Any

import torch

import pgrpo
from pgrpo.planning.flops import ModelDims, forward_flops

ROOT = Path(__file__).resolve().parents[1]
TEACHER = {"width": 128, "layers": 3, "steps": 1500}
STEPS, EVERY, MATCH = 400, 100, "eval/greedy/rewards/exact_match/mean"
FORMS = {
    "sampled": ["loss.teacher_kl=sampled", "rewards.functions[0].weight=0"],
    "full": ["loss.teacher_kl=full", "rewards.functions[0].weight=0"],
    "sampled, with the reward": ["loss.teacher_kl=sampled"],
}


def make_models(folder: Path) -> float:
    """Student and teacher; returns the teacher's exact match on held-out sums, sampled."""
    script = runpy.run_path(str(ROOT / "scripts" / "make_tiny_model.py"))
    rows, tokenizer = runpy.run_path(str(ROOT / "recipes" / "addition.py"))["rows"], script["make_tokenizer"]()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = script["make_model"](), script["make_model"](TEACHER["width"], TEACHER["layers"])
    script["warm_start"](student, tokenizer, rows("train"))
    script["warm_start"](teacher, tokenizer, rows("train"), TEACHER["steps"])
    for model, name in ((student, "student"), (teacher, "teacher")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return script["sampled_exact_match"](teacher.eval(), tokenizer, rows("eval"))


def run(folder: Path, form: str, seed: int) -> list[dict[str, Any]]:
    """One row an evaluation: step, exact match (greedy, held-out), KL to the teacher (mean of ten steps around it)."""
    keys = [
        f"model.path={folder / 'student'}",
        f"loss.teacher={folder / 'teacher'}",
        f"run_dir={folder / f'{form}-{seed}'}",
    ]
    keys += [f"seed={seed}", f"train.steps={STEPS}", f"eval.every={EVERY}", "eval.rows=256", "track.console=false"]
    written = pgrpo.train("quickstart", [*keys, *FORMS[form]])
    rows = [json.loads(line) for line in (written / "metrics.jsonl").read_text().splitlines()]
    kls = [row["teacher/kl"] for row in rows if row.get("teacher/kl") is not None]
    found = []
    for step in range(0, STEPS + 1, EVERY):
        match = next(r[MATCH] for r in rows if r.get("step") == step and MATCH in r)
        near = kls[max(0, step - 10) : max(10, step)]
        found.append({"step": step, "exact_match": match, "kl": sum(near) / len(near)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = make_models(folder)
        result: dict[str, Any] = {"teacher_sampled_exact_match": teacher, "runs": {}}
        print(f"teacher: sampled exact match {teacher:.3f} on held-out sums", flush=True)
        dims = ModelDims.from_config(json.loads((folder / "teacher" / "config.json").read_text()))
        shared, repeated = (forward_flops(dims, 6, [4] * 8, shared=flag) for flag in (True, False))
        print(f"teacher's pass: {shared / 1e6:.1f} MFLOP a group, {repeated / 1e6:.1f} with repeated prompts")
        for form in FORMS:
            runs = [run(folder, form, seed) for seed in range(args.seeds)]
            result["runs"][form] = runs
            print(f"\n{form}: step, greedy exact match and KL a token of each seed", flush=True)
            for at in zip(*runs, strict=True):
                print(f"{at[0]['step']:5d}  " + "   ".join(f"{row['exact_match']:.3f} {row['kl']:.3f}" for row in at))
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
