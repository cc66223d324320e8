"""Images in vLLM's prompts: what it is started with, what it is given, and that it makes of a prompt what the trainer has.

vLLM gets a prompt's ids with one placeholder an image, and the images; it processes them itself, by the model's own processor, and
expands the placeholders. The trainer expanded them too (``vision/reader.py``), with an image processor of the same class and the
same sizes, so that pixels are equal; that the ids are equal is checked for every prompt. In vLLM's caches an image's name is the
hash of its content. A request is all completions of a prompt, so its images are processed once.

What this file knows of vLLM's insides (0.26, 0.32):
- A prompt is a dict with ``prompt_token_ids``, ``multi_modal_data`` and ``multi_modal_uuids``. vLLM does not notice ids that are
  expanded already: it would expand them again. ``prompt_token_ids`` of an output are the expanded ones.
- Features of images are kept in GPU memory (the encoder cache), by the images' names. ``reset_encoder_cache`` drops them; sleeping
  does so too, and clears the cache of processed images.
- Its room is ``max_num_batched_tokens`` rows, and those of a step stay until its output is there: with asynchronous scheduling (a
  GPU's) one step longer. ``_try_schedule_encoder_inputs`` says how many tokens of a prompt a step may compute and of which images.
- Newer releases normalise pixels on the device unless ``mm_device_do_normalize`` is false.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pgrpo.rollout.vllm.requests import EngineError
from pgrpo.types import Request

PROCESSED_GIB = 2.0
"""The most host memory of vLLM's processed images: of 80 with 1,024 tokens in Qwen3-VL."""


@dataclass(frozen=True, slots=True)
class EngineImages:
    """What vLLM needs of a run's images.

    Attributes:
        picture: gives an image by its key and, of one that is not of the data, its file.
        most: images of the prompt that has the most, with those that an episode may be told; 0 for text.
        processor: arguments of the model's image processor, as the trainer calls it.
    """

    picture: Callable[..., Any]
    most: int
    processor: dict[str, Any] = field(default_factory=dict)


def start_arguments(images: EngineImages | None, known: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``LLM`` for a model with a vision tower; none for another (None). ``known``: the arguments that it takes."""
    if images is None:
        return {}
    arguments: dict[str, Any] = {
        "limit_mm_per_prompt": {"image": images.most, "video": 0},
        "mm_processor_cache_gb": PROCESSED_GIB,
    }
    if images.processor:
        arguments["mm_processor_kwargs"] = images.processor
    if "mm_device_do_normalize" in known:
        arguments["mm_device_do_normalize"] = False
    return arguments


def wait_for_room(scheduler: Any) -> None:
    """Let a prompt wait while there is no room for the features of its next image.

    vLLM would begin it with the text in front of that image, and so the rest of its group and all groups behind it. It looks for
    keys that others computed only where a prompt begins: each of these completions would compute and keep its whole prompt. A
    prompt that can go on by an image begins, and so does one that has the engine to itself: it may need more than all room.
    """
    plan = scheduler._try_schedule_encoder_inputs

    def planned(request: Any, computed: int, tokens: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        found = images, taken, *_ = plan(request, computed, tokens, *args, **kwargs)
        if images or taken == tokens or request.status.name == "RUNNING" or not scheduler.running:
            return found
        scheduler.encoder_cache_manager.free(request)  # its other images may have to make room for that one
        return (images, 0, *found[2:])

    scheduler._try_schedule_encoder_inputs = planned


def as_prompt(request: Request, images: EngineImages | None) -> dict[str, Any]:
    """A request's prompt as vLLM takes it."""
    if request.images is None:
        return {"prompt_token_ids": request.token_ids}
    assert images is not None, "the engine was built for prompts without images"
    found = request.images.images
    return {
        "prompt_token_ids": request.images.unexpanded_ids,
        "multi_modal_data": {
            "image": [images.picture(x.key, x.content) if x.content else images.picture(x.key) for x in found]
        },
        "multi_modal_uuids": {"image": [image.key for image in found]},
    }


def check_expanded(request: Request, found: Sequence[int]) -> None:
    """Raises EngineError if vLLM made other ids of a prompt with images than the trainer has."""
    wanted = request.token_ids
    if request.images is None or wanted == (found := list(found)):
        return
    shorter = min(len(wanted), len(found))
    at = next((i for i in range(shorter) if wanted[i] != found[i]), shorter)
    raise EngineError(
        f"{request.images.where}: vLLM makes {len(found)} tokens of this prompt with its images, the trainer {len(wanted)}; they "
        f"differ from token {at} on. Its image processor is not the trainer's: compare the versions of transformers and vLLM with "
        "`pgrpo doctor`, or set rollout.engine=embedded"
    )
