"""``pgrpo check``: tries a config on a few samples, and proves that grouped attention is exact on its model."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from pgrpo.admission.compare import difference, gradients, reference_logprobs, tokens_as_samples, untouched_model
from pgrpo.admission.models import check_model
from pgrpo.admission.seeded_bugs import SEEDED_BUGS
from pgrpo.admission.vision import image_bugs, rows_in_another_order
from pgrpo.commands.plan import plan_text
from pgrpo.config import Config, check_world_size, fit_world_size, redact
from pgrpo.config.sampling import sampling_params
from pgrpo.data import load_prompts
from pgrpo.distributed.world import start, world_size
from pgrpo.environments.transitions import Transition
from pgrpo.model.families.vision import Vision
from pgrpo.model.policy import Policy, load_model
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.planning.hub import load_hf_config
from pgrpo.rollout.base import sample_seeds
from pgrpo.tracking import printable
from pgrpo.tracking.live import showing
from pgrpo.training.build import Parts, build
from pgrpo.training.prompts import load_tokenizer
from pgrpo.training.rollout import sample_and_score
from pgrpo.types import Group, Prompt, PromptImages, Sample
from pgrpo.vision.families import attention_names, auto_class
from pgrpo.vision.parts import size_text

log = logging.getLogger(__name__)
SAMPLES = 4
COMPARED_TOKENS = 64
"""Tokens of each completion that are compared: enough to show any bug, few enough for the untouched model's full logits."""
LARGEST_LOGPROB_DIFFERENCE = 1e-3
LARGEST_GRADIENT_DIFFERENCE = 1e-3
"""Rounding of float32 through tens of layers stays well below both limits; a wrong mask, position or row is far above them."""


def check(config: Config) -> None:
    """Show four prompts, completions and rewards, token statistics and the plan; compare log-probs and gradients with the
    untouched model in float32. Leaves no run folder.

    Raises:
        RuntimeError: grouped attention differs from the untouched model, or a seeded bug is not detected.
    """
    config = fit_world_size(config, world_size())
    check_world_size(config, world_size())
    with (
        start(config.model.fsdp_size, config.model.sequence_parallel_size) as world,
        showing(console := Console(markup=False, highlight=False, quiet=not world.is_main)),
        build(config, world) as parts,
    ):
        _show_lengths(parts, config, console)
        groups = _sample(parts, config)
        _show_transitions(parts.transitions, console)
        console.print(_repeated(len(parts.stream)), end="")
        _show_samples(groups, load_tokenizer(config), console)
        rewards = [episode.reward for group in groups for episode in group.episodes]
        if world.is_main and config.rewards.functions and all(reward is None for reward in rewards):
            log.warning(
                "None of these completions has a reward: each function gave None, or failed. Rewards like these train nothing"
            )
        console.print(plan_text(config), soft_wrap=True)
        _prove(config, groups, console, parts.policy.vision)
        console.print("all checks passed")


def _show_lengths(parts: Parts, config: Config, console: Console) -> None:
    lengths = sorted(len(p.token_ids) for p in parts.stream.take(len(parts.stream)))
    data, over = config.data, "none"
    if data.overlong != "error":  # with "error" the first overlong prompt has stopped the command before
        loaded = load_prompts(data, config.prompt, load_tokenizer(config), reader=parts.reader)
        over = f"{loaded.dropped} (dropped)" if data.overlong == "drop" else f"{loaded.truncated} (truncated)"
    console.print(
        f"{len(lengths)} prompts of {lengths[0]} to {lengths[-1]} tokens, median {statistics.median(lengths):g}, "
        f"mean {statistics.fmean(lengths):.0f}, 95% at most {lengths[int(0.95 * (len(lengths) - 1))]}\n"
        f"over data.max_prompt_tokens={data.max_prompt_tokens}: {over}"
    )


def _sample(parts: Parts, config: Config) -> list[Group]:
    """Two completions of each of the first prompts, on every rank; each is scored on one rank. A reward that fails ends the
    command, or with ``rewards.on_error=mask`` is a warning."""
    prompts = parts.stream.take(SAMPLES)
    seeds = [sample_seeds(config.seed, "check", i, group_size=2) for i in range(len(prompts))]
    with parts.engine.awake(0):
        params = sampling_params(config)
        scored = sample_and_score(parts.episodes, parts.rewards, parts.world, prompts, params, seeds, "check")
    return parts.world.gather(scored.groups)


def _show_transitions(transitions: Sequence[Transition], console: Console) -> None:
    """What the chat template does between two turns: the proof for tools."""
    for name, problem, rewrites, can_fork in transitions:
        said = f"cannot be told ({problem})" if problem else "its tokens are exact"
        if problem and can_fork:
            said += "; with environment.history=fork it begins another sample"
        if rewrites:
            said += (
                f"; the template drops or rewrites {rewrites!r} of the turns before, which environment.history=append keeps, and "
                "fork leaves to another sample"
            )
        console.print(f"template, {name}: {_shown(said)}", soft_wrap=True)


def _show_samples(groups: list[Group], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    for group in groups:
        episode = group.episodes[0]
        prompt = episode.prompt or group.prompt
        values = ", ".join(f"{name} {value}" for name, value in episode.reward_parts.items())
        console.print(f"--- prompt ({len(prompt.token_ids)} tokens{_images(prompt)})\n{_shown(prompt.text)}")
        console.print(f"--- completion ({len(episode.token_ids)} tokens, {episode.finish_reason})")
        for sample in episode.samples if episode.messages else ():
            console.print(_masked(sample, tokenizer), soft_wrap=True)
        if not episode.messages:
            console.print(_shown(episode.text))
        console.print(f"--- reward {episode.reward} ({values})\n")


def _repeated(rows: int) -> str:
    """Says that a small data set's prompts are shown more than once."""
    return f"{rows} {'row' if rows == 1 else 'rows'}, repeated to {SAMPLES} prompts\n" if rows < SAMPLES else ""


def _images(prompt: Prompt) -> str:
    """The tokens of each image, and its size in pixels."""
    shown = []
    for image in prompt.images.images if prompt.images else ():
        size = f" ({image.size[0]} x {image.size[1]})" if image.size else ""
        shown.append(f"{sum(end - start for start, end in image.runs)}{size}")
    return f", images of {', '.join(shown)}" if shown else ""


def _masked(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The tokens behind the prompt: those that were sampled, and are trained on, in green; those that were read in grey, and on a
    terminal without colours in ``‹ ›``."""
    text, first = Text(), len(sample.prompt_ids)
    names = ["" for _ in sample.token_ids]
    for image in sample.images.images if sample.images else ():
        size = size_text(image.size or (0, 0))[:-1]
        for low, high in (run for run in image.runs if run[0] >= first):
            names[low - first : high - first] = [f"{size}, {high - low} tokens]"] * (high - low)
    for (sampled, name), run in groupby(zip(sample.mask, names, sample.token_ids, strict=True), key=lambda x: x[:2]):
        part = name or _shown(str(tokenizer.decode([token for *_, token in run])))
        text.append(part if sampled else f"‹{part}›", style="green" if sampled else "bright_black")
    return text


def _shown(text: str) -> str:
    return printable(redact(text))


def _prove(config: Config, groups: list[Group], console: Console, vision: Vision | None) -> None:
    """Compare on the CPU in float32, where rounding cannot hide a bug. LoRA's adapters are left out: they do not change
    attention."""
    model = config.model
    max_sample = config.max_sample_tokens
    hf_config = load_hf_config(model)
    console.print(str(check_model(model.path, hf_config, max_sample)), soft_wrap=True)
    untouched = untouched_model(
        lambda attention: auto_class(hf_config).from_pretrained(
            model.path,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=torch.float32,
            attn_implementation=attention_names(hf_config, attention),
        )
    )
    policy = Policy(load_model(model))
    samples = []
    for group in groups:
        completions = [_comparable(_beginning(sample)) for sample in group.samples]
        made = tokens_as_samples([_comparable(s.prompt_ids) for s in group.samples], [[ids] for ids in completions])
        samples += [
            replace(one, images=_within(whole.images, one)) for one, whole in zip(made, group.samples, strict=True)
        ]
    more, bugs = (lambda _: {}), SEEDED_BUGS
    if vision and policy.vision and (seen := Vision.of(untouched)):
        policy.vision.pixels = seen.pixels = vision.pixels
        # A plain picture's features are the same in any order, so that bug is left to the small copy.
        found = {name: bug for name, bug in image_bugs(hf_config).items() if bug is not rows_in_another_order}
        more, bugs = seen.reference_inputs, SEEDED_BUGS | found
    logprobs = reference_logprobs(untouched, samples, more=more)
    wanted = logprobs, gradients(logprobs, untouched)
    for name, forest in (("grouped", Forest.of(samples)), ("repeated", Forest.repeated(samples))):
        got = difference(policy, build_batch(forest), *wanted)
        console.print(
            f"{name} against the untouched model: {got.logprob:.1e} nats, gradient {got.gradient:.1e} (relative)"
        )
        if not (got.logprob <= LARGEST_LOGPROB_DIFFERENCE and got.gradient <= LARGEST_GRADIENT_DIFFERENCE):
            raise RuntimeError(
                f"{name} attention is not exact on {model.path}: log-probs differ by {got.logprob:.1e} nats, gradients by "
                f"{got.gradient:.1e}; at most {LARGEST_LOGPROB_DIFFERENCE:.0e} is rounding. Do not train this model with pgrpo"
            )
    for name, seed_bug in bugs.items():
        batch = seed_bug(build_batch(Forest.of(samples)))
        if batch is None:
            console.print(f"seeded bug, {name}: these few samples have no place for it")
            continue
        got = difference(policy, batch, *wanted)
        console.print(f"seeded bug, {name}: {got.logprob:.1e} nats, gradient {got.gradient:.1e}")
        if got.gradient <= LARGEST_GRADIENT_DIFFERENCE:
            raise RuntimeError(f"the comparison did not detect a seeded bug: {name}")


def _within(images: PromptImages | None, sample: Sample) -> PromptImages | None:
    """The images that the sample's tokens have."""
    end = len(sample.prompt_ids) + len(sample.token_ids)
    kept = tuple(image for image in (images.images if images else ()) if image.runs[-1][1] <= end)
    return replace(images, images=kept) if images and kept else None


def _beginning(sample: Sample) -> list[int]:
    """As many of the tokens behind the prompt as are compared: those before the first image that is not whole there."""
    first, end = len(sample.prompt_ids), len(sample.prompt_ids) + COMPARED_TOKENS
    runs = [image.runs for image in sample.images.images] if sample.images else []
    cut = min([own[0][0] for own in runs if own[-1][1] > end and own[0][0] >= first], default=end)
    return sample.token_ids[: min(cut, end) - first]


def _comparable(token_ids: list[int]) -> list[int]:
    """Repeat a single token, so that there are at least two: in a shorter prompt or completion the seeded bugs change nothing."""
    return token_ids if len(token_ids) > 1 else (token_ids or [0]) * 2
