"""Refuses what is not supported with images, before any weight is loaded, and connects models with the images of the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from pgrpo.admission.models import is_dropout
from pgrpo.config import Config, ConfigError
from pgrpo.config.task import ImageConfig
from pgrpo.distributed.world import World
from pgrpo.model.policy import Policy
from pgrpo.placement.choices import engine_name, teacher_model
from pgrpo.planning.hub import load_hf_config
from pgrpo.rollout.vllm.images import EngineImages
from pgrpo.types import Prompt
from pgrpo.vision.families import FAMILIES, TOWER_ON_REQUEST, Family, family_of, image_token_id
from pgrpo.vision.pixels import PixelStore
from pgrpo.vision.processors import Processor
from pgrpo.vision.reader import ImageReader

IN_VLLM = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
"""Families for which vLLM passed its contract tests."""


def image_reader(
    config: Config, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, world: World
) -> ImageReader | None:
    """What reads the run's images; None for a model without a vision tower, and for prompts that have no place for images.

    Raises:
        ConfigError: names the key that does not go with images, or with this model.
    """
    model, prompt, family = config.model, config.prompt, family_of(hf_config)
    if model.load_vision and hf_config.model_type not in TOWER_ON_REQUEST:
        raise ConfigError(
            f"model.load_vision: true has no effect on a {hf_config.model_type} model: it is for {', '.join(TOWER_ON_REQUEST)}; "
            "leave it out"
        )
    if family is None:
        for key, value in (
            ("prompt.images_column", prompt.images_column),
            ("model.train_vision", model.train_vision),
            ("model.train_projector", model.train_projector),
            ("environment.max_images", config.environment.max_images),
            *_image_keys(config),
        ):
            if value and hf_config.model_type in TOWER_ON_REQUEST:
                raise ConfigError(
                    f"{key}: {value}: a {hf_config.model_type} model is trained as a language model, without its vision tower; set "
                    "model.load_vision=true, or leave it out"
                )
            if value:
                raise ConfigError(
                    f"{key}: {value}: model.path={model.path} is a {hf_config.model_type} model, without a vision tower that is "
                    f"known; leave it out, or name a model of {', '.join(FAMILIES)}"
                )
        return None
    _check_model(config, hf_config, family, world)
    if not (prompt.images_column or prompt.messages_column or config.environment.max_images):
        for key in ("load_vision", "train_vision", "train_projector"):
            if getattr(model, key):
                raise ConfigError(f"model.{key}: true has no effect on prompts without images; leave it out")
        for key, value in _image_keys(config):
            raise ConfigError(f"{key}: {value} has no effect on prompts without images; leave it out")
        return None  # image parts of messages are then an error
    reader = ImageReader(model, hf_config, tokenizer, config.data.image)
    if config.loss.teacher is not None:
        reader.teacher = _teacher(config, hf_config, tokenizer)
    return reader


def _image_keys(config: Config) -> list[tuple[str, Any]]:
    """Keys of images that are not at their defaults, with their values."""
    ours, default = config.data.image, ImageConfig()
    return [(f"data.image.{key}", value) for key, value in vars(ours).items() if value != getattr(default, key)]


def _teacher(config: Config, hf_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Processor:
    """What makes pixels for the model of ``loss.teacher``, which reads the batch that is packed for the policy."""
    model = teacher_model(config)
    theirs = load_hf_config(model)
    if theirs.model_type != hf_config.model_type or image_token_id(theirs) != image_token_id(hf_config):
        raise ConfigError(
            f"loss.teacher={model.path}: a {theirs.model_type} model does not read prompts with images as the "
            f"{hf_config.model_type} model in model.path does; name a teacher of the same family"
        )
    try:
        return Processor(model, theirs, tokenizer, config.data.image)
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", "loss.teacher", 1)) from error


def _check_model(config: Config, hf_config: PretrainedConfig, family: Family, world: World) -> None:
    model = config.model
    if engine_name(config, world.device) == "vllm" and hf_config.model_type not in IN_VLLM:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: vLLM was not tested to sample what a {hf_config.model_type} model computes "
            f"({', '.join(IN_VLLM)} were); set rollout.engine=embedded"
        )
    if engine_name(config, world.device) == "vllm" and find_spec("torchvision") is None:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine}: vLLM needs torchvision for a {hf_config.model_type} model: install the build "
            "that fits this PyTorch, or set rollout.engine=embedded"
        )
    for key in ("train_vision", "train_projector"):
        if getattr(model, key) and model.lora_rank:
            raise ConfigError(
                f"model.{key}: true together with model.lora_rank={model.lora_rank}, which trains adapters of the language model "
                "alone; leave one of them out"
            )
    if family.sees_whole_images and model.compile:
        raise ConfigError(
            f"model.compile: true: layers of a {hf_config.model_type} model are not compiled, as rows of its images see each "
            "other; leave it out"
        )
    for name, value in hf_config.vision_config.to_dict().items():
        if is_dropout(name) and isinstance(value, float) and value > 0:
            raise ConfigError(
                f"model.path={model.path}: vision_config.{name}={value}: features that samples share cannot have dropout: "
                "set it to 0 in its config.json"
            )


def engine_images(
    config: PretrainedConfig, reader: ImageReader | None, prompts: Iterable[Prompt], told: int = 0
) -> EngineImages | None:
    """What vLLM needs of the images of these prompts, and of ``told`` more that an episode may be given; None for a model without a
    vision tower."""
    if family_of(config) is None:
        return None
    if reader is None:
        return EngineImages(_no_picture, 0)
    most = max((len(prompt.images.images) for prompt in prompts if prompt.images), default=0)
    return EngineImages(reader.picture, most + told, reader.processor.size)


def _no_picture(key: str) -> NoReturn:
    raise KeyError(f"no image {key} was read")


def see(model: Policy, reader: ImageReader | None, *, teaches: bool = False) -> None:
    """Give the model the images of the data. ``teaches``: it is that of ``loss.teacher``."""
    if model.vision is not None and reader is not None:
        model.vision.store = reader.teacher_pixels if teaches else reader.pixels
        model.vision.pixels, model.vision.dummy = model.vision.store, reader.dummy


def prepare_images(models: Iterable[Policy | None], keys: Sequence[str]) -> None:
    """Announce the images that the models need from now on, in order: their pixels are made in threads, while other things run."""
    needed = dict[PixelStore, list[str]]()
    for model in models:
        if model is not None and model.vision is not None and model.vision.store is not None:
            needed.setdefault(model.vision.store, []).extend(model.vision.missing(keys))
    for store, missing in needed.items():
        store.prepare(missing)


def prepare_prompts(models: Sequence[Policy | None], prompts: Iterable[Prompt]) -> None:
    """``prepare_images`` of these prompts."""
    prepare_images(models, [image.key for prompt in prompts if prompt.images for image in prompt.images.images])
