"""Run by every rank: log-probs and gradients in float64 of ranks that compute a batch together, against the untouched model."""

from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from seeing import CONFIGS
from transformers import AutoModelForCausalLM
from worker import long_tailed_groups, one_update, together

from pgrpo.admission.compare import gradients, reference_logprobs
from pgrpo.admission.shrink import shrink
from pgrpo.admission.twins import True64, twins
from pgrpo.admission.vision import RandomImages, reference_inputs
from pgrpo.attention.hook import ATTENTION_NAME
from pgrpo.distributed.sequence import Ulysses
from pgrpo.model import recompute
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest


def compiled(world, model, changes):
    """How far an update with compiled layers is from one without (relative norm of all gradients), and compilations of a layer."""
    plain = one_update(world, model, changes)["gradients"]
    compile_, torch.compile = torch.compile, partial(torch.compile, backend="aot_eager")
    torch._dynamo.reset()
    recompute.compile_dynamic.cache_clear()
    try:
        got = one_update(world, model, changes | {"compile": True})["gradients"]
        entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(recompute._all_but_attention.__code__)
    finally:
        torch.compile = compile_
        recompute.compile_dynamic.cache_clear()
    want, found = (torch.cat([g[name].flatten() for name in plain]) for g in (plain, got))
    return ((found - want).norm() / want.norm()).item(), len(entries)


class Found(NamedTuple):
    logprob: float
    gradient: float
    rows: int
    owned: int


class Seen(NamedTuple):
    """Differences of log-probs and gradients, of all parameters and of tower and projector alone; calls of the tower; image rows
    of this rank; whether an image goes on on the next."""

    logprob: float
    gradient: float
    tower: float
    calls: int
    owned: int
    is_cut: bool


def images_in_float64(world, name, size, shared):
    """A small vision-language model, all of which is trained, as ``in_float64`` does. Every rank makes it and its images from the
    same seed. ``shared``: prompts are."""
    world = together(world, size)
    with torch.random.fork_rng(), True64():
        untouched, grouped = twins(shrink(CONFIGS[name]), 0)
        images = RandomImages(grouped.config, untouched, 0)
        samples = images.samples(grouped.config.get_text_config().vocab_size)
        pack = Forest.of if shared else Forest.repeated
        if pack(samples).rows % size == 0:
            samples = samples[:-1]
        policy = Policy(grouped, ranks=Ulysses.of(world))
        assert policy.vision is not None
        policy.vision.pixels = images.pixels
        wanted = reference_logprobs(untouched, samples, more=reference_inputs(untouched, images))
        want = gradients(wanted, untouched)
        batch = build_batch(pack(samples))
        logprobs = policy(batch).logprobs
        got = gradients(logprobs, grouped)
    for gradient in got:
        dist.all_reduce(gradient)
        gradient /= world.dp_size
    family = policy.vision.family
    names = [family.is_projector(n.removeprefix("model.")) is not None for n, _ in grouped.named_parameters()]
    ranks = Ulysses.of(world)
    assert ranks is not None and batch.images is not None and sum(names) > 10
    first, end = ranks.bounds(batch.packed_tokens)
    owned = len(batch.images.between(first, end).rows)
    is_cut = any(block.start < end < block.end for block in batch.images.blocks)

    def apart(of):
        whole, found = (
            torch.cat([g.flatten() for g, is_tower in zip(gradient, names, strict=True) if is_tower in of])
            for gradient in (want, got)
        )
        return ((found - whole).norm() / whole.norm()).item()

    far = (logprobs - wanted).abs().max().item()
    return Seen(far, apart({True, False}), apart({True}), policy.vision.calls, owned, is_cut)


def in_float64(world, model, size, beginning):
    """Differences of log-probs and of the gradient that all ranks add up to; rows of the batch, and tokens that this rank predicts.
    All ranks have the same batch, so shares of the data add the same gradient."""
    world = together(world, size)
    samples = [sample for group in long_tailed_groups(beginning)[:5] for sample in group.samples]
    if Forest.of(samples).rows % size == 0:
        samples = samples[:-1]

    def load(attention):
        own = {"dtype": torch.float64, "experts_implementation": "eager"}
        return AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention, **own).double()

    batch = build_batch(Forest.of(samples))
    with True64():
        try:
            untouched = load("sdpa")
        except ValueError:
            untouched = load("eager")
        policy = Policy(load(ATTENTION_NAME), ranks=Ulysses.of(world))
        wanted = reference_logprobs(untouched, samples)
        want = gradients(wanted, untouched)
        logprobs = policy(batch).logprobs
        got = gradients(logprobs, policy.model)
    for gradient in got:
        dist.all_reduce(gradient)
        gradient /= world.dp_size
    ranks = Ulysses.of(world)
    assert ranks is not None
    whole, found = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (want, got))
    error = (found - whole).norm() / whole.norm()
    strided = torch.arange(12.0 * size).view(3, 4 * size).T + 100 * world.rank
    assert torch.equal(ranks.exchange(strided), ranks.exchange(strided.clone(memory_format=torch.contiguous_format)))
    owned, _ = ranks.owned(batch.logit_index.index_select(0, batch.distinct), batch.packed_tokens)
    return Found((logprobs - wanted).abs().max().item(), error.item(), batch.packed_tokens, len(owned))
