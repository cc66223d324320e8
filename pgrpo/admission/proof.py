"""Proves that grouped attention is exact on a model before its weights are loaded: on a small copy with random weights.

The small model (``shrink.py``) runs twice on the CPU, in float64: untouched, one unpadded sample a call, and grouped. Log-probs and
gradients must agree to rounding, and bugs that are seeded into the packed batch must not go unseen. Whatever a model does that
grouped attention does not follow then shows as a number, whether anybody has thought of it or not.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from pgrpo.admission.compare import (
    Difference,
    difference,
    first_difference,
    gradients,
    reference_logprobs,
    tokens_as_samples,
)
from pgrpo.admission.reach import beyond_reach
from pgrpo.admission.seeded_bugs import SEEDED_BUGS
from pgrpo.admission.shrink import Small, shrink
from pgrpo.admission.twins import NotSmall, True64, default_dtype, one_thread, quiet, twins
from pgrpo.admission.vision import RandomImages, image_bugs, reference_inputs
from pgrpo.attention.hook import ATTENTION_NAME, UnsupportedAttentionError, attention_forward
from pgrpo.model.policy import Policy
from pgrpo.model.recompute import set_up_layers
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.dims import decoder_layers
from pgrpo.process import deadline
from pgrpo.process.deadline import TimeUp, time_limit
from pgrpo.types import Sample
from pgrpo.vision.families import family_of

log = logging.getLogger(__name__)

EXACT, EXACT_PLAIN = 1e-9, 1e-4
"""Largest differences of log-probs (nats) and of gradients (relative) that are rounding: in float64 throughout (measured: below
1e-12), and where parts of the model compute in float32 whatever its dtype is. What is wrong is off by 1e-1 and more."""
MOST_SECONDS = 60.0
"""Time of a proof. One of an exact model takes less than ten seconds of one core, most take one; a busy machine needs more."""
NO_HOOK = "its attention does not call the hook that transformers has for attention functions"
SEEN = 1000
"""A seeded bug moves some log-prob by so many times what counts as rounding, at least."""


@dataclass(frozen=True)
class Proof:
    """How a small copy of a model fared.

    Attributes:
        logprob, gradient: largest difference of a log-prob (nats), and relative error of all gradients.
        bugs: the largest difference of a log-prob that each seeded bug made.
        refusal: why the model must not be trained; empty if it is exact.
        not_kept: why no prefix of this model is kept for several passes (``model/kept.py``); empty if log-probs behind a kept one
            are exact too.
        seconds: time that the proof took.
    """

    logprob: float = float("nan")
    gradient: float = float("nan")
    bugs: dict[str, float] = field(default_factory=dict)
    refusal: str = ""
    not_kept: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        bugs = ", ".join(f"{name} {size:.0e}" for name, size in self.bugs.items())
        return (
            f"grouped attention is exact on a small copy of this model: log-probs differ by {self.logprob:.0e} nats, gradients by "
            f"{self.gradient:.0e} (float64); seeded bugs: {bugs}; {self.seconds:.1f} s"
        )


def prove(
    config: PretrainedConfig, max_sample: int | None = None, small: Small | None = None, seed: int = 0, stretch: int = 1
) -> Proof:
    """Prove or refuse a model by its config.

    Args:
        config: of the model, as ``load_hf_config`` loads it. If it has an ``auto_map``, code of the model runs.
        max_sample: the longest sample of the run; lengths that it does not reach are not proven. None: all are.
        small, seed, stretch: sizes, weights and samples, and how many times as long these are, for a second opinion.
    """
    started = time.perf_counter()
    try:
        with (
            time_limit(MOST_SECONDS),
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            quiet(),
            default_dtype(torch.float64),
            one_thread(),
        ):
            sizes = small or Small()
            try:
                proof = _compare(config, max_sample, sizes, seed, stretch)
            except NotSmall:
                raise
            except Exception:  # an integer that no rule knows may be no length, and the copy not run with a small one
                known = sizes._replace(guesses=False)
                if shrink(config, max_sample, known).to_dict() == shrink(config, max_sample, sizes).to_dict():
                    raise
                proof = _compare(config, max_sample, known, seed, stretch)
    except TimeUp as late:
        proof = Proof(
            refusal=f"a small copy of it took longer than {MOST_SECONDS:g} s (in {_place(late)}), where ten are enough on an idle "
            "machine: run it again when this one is idle; pgrpo cannot train a model that still takes longer"
        )
    except NotSmall as error:
        proof = Proof(refusal=str(error))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        what = f"{type(error).__name__}: {first_line[:200]} ({_place(error)})"
        proof = Proof(refusal=f"a small copy of it does not run: {what}")
        if isinstance(error, KeyError) and ATTENTION_NAME in first_line:
            proof = Proof(refusal=NO_HOOK)
    return replace(proof, seconds=time.perf_counter() - started)


def _place(error: BaseException) -> str:
    """The file and the function that raised it, or that ``time_limit`` interrupted."""
    at = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != deadline.__file__][-1]
    return f"{Path(at.filename).name}, {at.name}"


def _compare(config: PretrainedConfig, max_sample: int | None, sizes: Small, seed: int, stretch: int) -> Proof:
    small = shrink(config, max_sample, sizes)
    untouched, grouped = twins(small, seed)
    vocab, images = small.get_text_config().vocab_size, None
    if family_of(small):
        with True64():
            images = RandomImages(small, untouched, seed)
            samples = images.samples(vocab, stretch)
    else:
        samples = proof_samples(vocab, seed, stretch)

    def compare_in(mode: Callable[[], Any], exact: float) -> Proof:
        proof = _compare_in(mode, exact, untouched, grouped, samples, images)
        if proof.refusal:
            return proof
        return replace(proof, refusal=beyond_reach(config, max_sample, sizes, seed, stretch, mode, exact))

    try:
        return compare_in(True64, EXACT)
    except (TypeError, RuntimeError, ValueError) as error:
        first = error
    try:  # a model whose code does not run in that mode
        return compare_in(nullcontext, EXACT_PLAIN)
    except Exception as error:
        raise error from first


def _compare_in(
    mode: Callable[[], Any],
    exact: float,
    untouched: PreTrainedModel,
    grouped: PreTrainedModel,
    samples: list[Sample],
    images: RandomImages | None,
) -> Proof:
    batch, bugs = build_batch(Forest.of(samples)), SEEDED_BUGS
    with mode():
        policy = _policy(grouped)
        policy.head.logits = _within(
            mode, policy.head.logits
        )  # called in the backward, for which autograd leaves the mode
        wanted = reference_logprobs(untouched, samples, more=reference_inputs(untouched, images))
        if images and policy.vision:
            policy.vision.pixels, bugs = images.pixels, bugs | image_bugs(images.config)
        wanted_gradients = gradients(wanted, untouched)
        with _hook_calls() as calls:
            found = difference(policy, batch, wanted, wanted_gradients)
        if not (found.logprob <= exact and found.gradient <= exact):
            refusal = _refusal(found, untouched, policy, samples, batch, images)
            return Proof(found.logprob, found.gradient, refusal=refusal if calls else f"{NO_HOOK}; {refusal}")
        with torch.no_grad():
            sizes = {
                name: (policy(buggy).logprobs - wanted).abs().max().item() if (buggy := seed_bug(batch)) else 0.0
                for name, seed_bug in bugs.items()
            }
            not_kept = _not_kept(policy, samples, wanted, exact)
            positions = images is not None or _stretched(untouched, samples[0]) > SEEN * exact
    unseen = [
        name for name, size in sizes.items() if not size > SEEN * exact and (positions or "positions" not in name)
    ]
    refusal = f"the proof would not notice a bug: {', '.join(unseen)}" if unseen else ""
    return Proof(found.logprob, found.gradient, sizes, refusal, not_kept)


def _within(mode: Callable[[], Any], call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def called(*args: Any) -> Tensor:
        with mode():
            return call(*args)

    return called


def _policy(model: PreTrainedModel) -> Policy:
    """Raises ValueError if the head's forward does not leave the decoder out, by which ``Head`` learns what it computes."""
    try:
        return Policy(model)
    except (AttributeError, UnsupportedAttentionError) as error:
        raise ValueError(f"its head is not computed from what its base_model returns ({error})") from error


def _not_kept(policy: Policy, samples: Sequence[Sample], wanted_L: Tensor, exact: float) -> str:
    """Compares log-probs of the first prompt's samples where two thirds of the prompt are kept. Gradients need no look of their
    own: those of the prefix are autograd's, of all that the samples read of it."""
    if policy.vision is not None:
        return "the model sees images"
    own = [sample for sample in samples if sample.prompt_ids == samples[0].prompt_ids]
    batch = build_batch(replace(Forest.of(own), kept=2 * len(own[0].prompt_ids) // 3), attention=policy.attention)
    layers = decoder_layers(policy.model)
    set_up_layers(layers, ["none" for _ in layers], compiled=False)
    try:
        policy.keep(batch)
        found_L = policy(batch).logprobs
    except Exception as error:  # whatever it is: the model is exact without kept prefixes. ``TimeUp`` is none of these
        first_line = (str(error).strip().splitlines() or [""])[0]
        return first_line if type(error) is RuntimeError and first_line else f"{type(error).__name__}: {first_line}"
    finally:
        policy.kept = None
    off = (found_L - wanted_L[: len(found_L)]).abs().max().item()
    return "" if off <= exact else f"log-probs behind a kept prefix differ by {off:.1e} nats"


def _stretched(model: nn.Module, sample: Sample) -> float:
    """How much the untouched model's logits change if positions are twice as far apart: 0 in a model without positions."""
    ids = torch.tensor([sample.prompt_ids])
    positions = torch.arange(ids.shape[1])[None]
    try:
        near, far = (model(input_ids=ids, position_ids=p, use_cache=False).logits for p in (positions, 2 * positions))
    except TypeError:  # it takes no positions
        return 0.0
    return (near - far).abs().max().item()


def _refusal(
    found: Difference,
    untouched: PreTrainedModel,
    policy: Policy,
    samples: Sequence[Sample],
    batch: GroupedBatch,
    images: RandomImages | None,
) -> str:
    more = reference_inputs(untouched, images)
    where = first_difference(untouched, policy, samples, batch, more)
    with torch.no_grad():
        one, two = (reference_logprobs(untouched, samples, more=more) for _ in range(2))
    if (noise := (one - two).abs().max().item()) > EXACT:
        where += (
            f"; the untouched model itself differs by {noise:.1e} nats from one call to the next: in training it is random, or "
            "changes with each call"
        )
    return (
        f"log-probs differ from the untouched model's by {found.logprob:.1e} nats, gradients by {found.gradient:.1e} (relative, on "
        f"a small copy in float64); {where}"
    )


@contextmanager
def _hook_calls() -> Iterator[list[nn.Module]]:
    """Collects the modules that call the attention function."""
    calls: list[nn.Module] = []

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return attention_forward(module, *args, **kwargs)

    AttentionInterface.register(ATTENTION_NAME, counted)
    try:
        yield calls
    finally:
        AttentionInterface.register(ATTENTION_NAME, attention_forward)


def proof_samples(vocab: int, seed: int = 0, stretch: int = 1) -> list[Sample]:
    """Three prompts, of which two begin alike; completions that begin alike, are empty, or of one token. Up to 20 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, vocab - 4, (n * stretch,), generator=generator).tolist()

    system, begin = ids(4), ids(3)
    long, short = system + ids(5), system + ids(3)
    completions = [[begin + ids(6), begin + ids(2), ids(1), []], [ids(8), ids(7)], [ids(4)]]
    return tokens_as_samples([long, short, ids(1)], completions)
