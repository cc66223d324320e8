"""Compares grouped log-probs and gradients with the untouched transformers model on a real model, in float64 and float32.

    python benchmarks/exactness.py --model .cache/smollm2_135m [--group-size 8]

Prompts of different lengths; completions of different lengths, one empty and one of a single token. Prints every number, and
fails if float64 differs by more than 1e-6 nats or 1e-5 (relative, gradients), if the float32 error exceeds 1.5 times that of the
untouched model, or if a seeded bug is not detected.
"""

from __future__ import annotations

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgrpo.admission.compare import difference, gradients, reference_logprobs, tokens_as_samples
from pgrpo.admission.seeded_bugs import SEEDED_BUGS
from pgrpo.config import ModelConfig
from pgrpo.model.policy import Policy, load_model
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest

PROMPTS = [
    "What is the capital of France?",
    "23 + 45 = 68\n17 + 36 = 53\n64 + 19 = 83\n51 + 28 = 79\n42 + 62 =",
    "Once upon a time there was a tailor who had three sons and only one goat, which fed them all with its milk, and so had to "
    "be given good food and be led out to graze every day. The sons took turns doing this. One day",
    "Sum:",
]
TEXT = (
    " The answer is not hard to find once you know where to look, and so the three of them set out in the morning "
    "with bread, a map, and no small amount of hope."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--group-size", type=int, default=8)
    args = parser.parse_args()
    if args.group_size < 4:
        parser.error("--group-size must be at least 4: one completion is empty, one a single token, two are longer")

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [tokenizer(p).input_ids for p in PROMPTS]
    text = tokenizer(TEXT).input_ids
    lengths = [6, 4, 1, 0, *(3 + 3 * i for i in range(args.group_size - 4))]
    completions = [[text[i : i + n] for i, n in enumerate(lengths)] for _ in prompts]
    samples = tokens_as_samples(prompts, completions)
    print(f"prompts of {[len(p) for p in prompts]} tokens, completions of {lengths} tokens each")

    def untouched(dtype: torch.dtype) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa")

    def policy(dtype: torch.dtype) -> Policy:
        return Policy(load_model(ModelConfig(path=args.model))).to(dtype)

    batch = build_batch(Forest.of(samples))
    model = untouched(torch.float64)
    logprobs = reference_logprobs(model, samples)
    truth = logprobs.detach(), gradients(logprobs, model)
    del model, logprobs
    exact = policy(torch.float64)
    got = difference(exact, batch, *truth)
    print(f"float64: max |d logprob| {got.logprob:.1e} nats, gradient {got.gradient:.1e} (relative)")
    passed = got.logprob <= 1e-6 and got.gradient <= 1e-5
    for name, seed_bug in SEEDED_BUGS.items():
        buggy = seed_bug(batch)
        assert buggy is not None, name
        bug = difference(exact, buggy, *truth)
        print(f"seeded bug, {name}: {bug.logprob:.1e} nats, gradient {bug.gradient:.1e}")
        passed &= bug.logprob > 1e-6 and bug.gradient > 1e-5
    del exact

    model = untouched(torch.float32)
    logprobs = reference_logprobs(model, samples)
    own = (logprobs.detach().double() - truth[0]).norm()
    own_gradient = _error(gradients(logprobs, model), truth[1])
    del model, logprobs
    rounded = policy(torch.float32)
    ours = (rounded(batch).logprobs.detach().double() - truth[0]).norm()
    our_gradient = difference(rounded, batch, *truth).gradient
    print(
        f"float32 error of log-probs against float64: grouped {ours:.2e}, untouched {own:.2e}, ratio {ours / own:.2f}"
    )
    print(f"float32 error of gradients against float64: grouped {our_gradient:.2e}, untouched {own_gradient:.2e}")
    passed &= bool(ours <= 1.5 * own)
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


def _error(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    error = sum((g.double() - w).square().sum().item() for g, w in zip(got, wanted, strict=True))
    return (error / sum(w.square().sum().item() for w in wanted)) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
