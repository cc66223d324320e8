"""benchmarks/effects.py: what it measures of trained weights, against one sample at a time; what it compares can be run."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgrpo.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "effects.py"))
ROWS = [{"a": 12, "b": 34, "answer": "46"}, {"a": 77, "b": 55, "answer": "132"}]


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> tuple[Any, Any, Any]:
    """The model, another one, the tokenizer."""
    model, other = (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    return model, other, AutoTokenizer.from_pretrained(tiny_model)


@torch.no_grad()
def test_expected_exact_match(parts: tuple[Any, Any, Any]) -> None:
    _, model, tokenizer = parts
    chances = []
    for row in ROWS:
        ids, chance = tokenizer(f"{row['a']}+{row['b']}=").input_ids, 1.0
        for token in tokenizer(f"{row['answer']}<eos>").input_ids:
            chance *= model(torch.tensor([ids])).logits[0, -1].softmax(-1)[token].item()
            ids = [*ids, token]
        chances.append(chance)
    assert chances[0] != chances[1]
    assert SCRIPT["exact_match"](model, tokenizer, ROWS) == pytest.approx(sum(chances) / 2, rel=1e-4)


@torch.no_grad()
def test_kl_of_what_is_sampled(parts: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Along the tokens that were drawn, up to the eos, which counts."""
    reference, model, tokenizer = parts
    monkeypatch.setitem(SCRIPT["kl"].__globals__, "LIMIT", 12)
    drawn: list[torch.Tensor] = []
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, n: drawn.append(draw(p, n)) or drawn[-1])
    got = SCRIPT["kl"](model, reference, tokenizer, ROWS)
    eos, terms = tokenizer.eos_token_id, []
    for i, row in enumerate(ROWS):
        ids = tokenizer(f"{row['a']}+{row['b']}=").input_ids
        for token in (int(step[i]) for step in drawn):
            p, q = (m(torch.tensor([ids])).logits[0, -1].double().softmax(-1) for m in (model, reference))
            terms.append((p * (p / q).log()).sum().item())
            ids = [*ids, token]
            if token == eos:
                break
    assert len(terms) < 24, "no eos was drawn"
    assert got == pytest.approx(sum(terms) / len(terms), rel=1e-3)
    assert got > 0.01
    assert SCRIPT["kl"](model, model, tokenizer, ROWS) == 0


def test_what_is_compared_can_be_run(tiny_model: Path) -> None:
    keys = [f"model.path={tiny_model}", "run_dir=unused"]
    weights, resampling, kl = (
        [load_config("quickstart", [*keys, *overrides]) for _, overrides, _ in SCRIPT["variants"](name)]
        for name in ("weights", "resampling", "kl")
    )
    assert [[f.weight for f in c.rewards.functions] for c in weights] == [[1, 0], [0, 1], [1, 1]]
    assert [c.rollout.resample_limit for c in resampling] == [0, 10]
    assert [c.loss.kl_coef for c in kl] == [0, 0.04, 0.4]
    rows = SCRIPT["variants"]("resampling")[0][2]
    assert sum(row["answer"] == "none" for row in rows) == pytest.approx(0.75 * len(rows), abs=1)
