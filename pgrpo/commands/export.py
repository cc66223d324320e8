"""``pgrpo export``: writes the model of a checkpoint as a Hugging Face folder that ``from_pretrained`` and vLLM load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from pgrpo.checkpoint import PREFIX, CheckpointError, latest, load
from pgrpo.commands.model_card import write_card
from pgrpo.commands.source_files import copy_source_files, source_folder
from pgrpo.config import ConfigError, ModelConfig
from pgrpo.early import check_folder_to_write, config_of_run
from pgrpo.model.families.experts import untrained_text
from pgrpo.model.families.vision import freeze
from pgrpo.model.lora import add_adapters, merge_adapters
from pgrpo.planning.hub import load_hf_config, pretrained_model
from pgrpo.vision.families import auto_class


def export(
    run_dir: Path, out: Path, step: int | None = None, dtype: Literal["float32", "bfloat16"] = "float32"
) -> Path:
    """Write weights, the initial model's config and tokenizer files, and a model card to ``out``, completely or not at all, and
    return it.

    Args:
        run_dir: the run folder. Its config.yaml names the initial model, from which everything except the weights is taken. With
            LoRA the weights are the initial model's too, and the checkpoint's adapters are added to them.
        out: a folder that does not exist, or is empty.
        step: which checkpoint. None takes the newest one that is undamaged.
        dtype: of the written weights, and the one change in the initial model's config.json. Checkpoints hold float32; bfloat16
            rounds it and halves the size.

    Raises:
        ConfigError: not a run folder, no such checkpoint, or ``out`` is in use.
        CheckpointError: the checkpoint is damaged, or belongs to another model.
    """
    run_dir, out = Path(run_dir), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder; give another one")
    check_folder_to_write(out)
    source = _model_config(run_dir)
    root = run_dir / "checkpoints"
    path = latest(root) if step is None else root / f"{PREFIX}{step}"
    if path is None:
        raise ConfigError(f"{root}: there is no readable checkpoint")
    trained = int(path.name.removeprefix(PREFIX))
    weights = load(path, only=("model",))[0].get("model")
    if weights is None:
        raise CheckpointError(f"{path}: has no tensor set named model")
    build = build_merged_model if source.lora_rank else build_model
    model = build(source, weights, path).to(getattr(torch, dtype))
    initial = source_folder(source)
    writing = out.absolute().parent / f".writing-{out.name}"
    shutil.rmtree(writing, ignore_errors=True)
    try:
        model.save_pretrained(writing)
        copy_source_files(initial, writing, dtype, model.config.model_type)
        write_card(run_dir, trained, writing, out.name)
        # safetensors creates files that only their owner can read; a server may run as another user.
        for file in writing.glob("*.safetensors"):
            file.chmod((writing / "config.json").stat().st_mode)
        writing.rename(out)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    if text := untrained_text(model.config):
        print(text)
    print(f"wrote {out}: the weights after step {trained}, {dtype}")
    return out


def build_model(source: ModelConfig, weights: Mapping[str, Tensor], path: Path) -> PreTrainedModel:
    """The model that ``source`` names, with ``weights``; tied weights may have any one of their names."""
    config = load_hf_config(source)
    with torch.device("meta"):  # allocates and initialises nothing: the weights are assigned below
        model = auto_class(config).from_config(config, trust_remote_code=source.trust_remote_code, dtype=torch.float32)
    freeze(model, tower=not source.train_vision, projector=not source.train_projector)  # so it is not in the checkpoint
    names_of: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    state = dict(weights)
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if untrained := model.state_dict().keys() - trained - state.keys():  # as the correction of a router's scores
        state |= {name: x for name, x in _initial(source).state_dict().items() if name in untrained}
    for names in names_of.values():
        if given := [name for name in names if name in weights]:
            state |= dict.fromkeys(names, weights[given[0]])
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: this is not a checkpoint of the model {source.path}: {reason}") from error
    model.tie_weights()
    return model


def build_merged_model(source: ModelConfig, adapters: Mapping[str, Tensor], path: Path) -> PreTrainedModel:
    """The model that ``source`` names with LoRA adapters merged in. Its weights are rounded to the run's precision first, as in
    training."""
    model = _initial(source, getattr(torch, source.dtype)).float()
    add_adapters(model, source, seed=0)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if differing := sorted(wanted ^ adapters.keys()):
        raise CheckpointError(f"{path}: these are not adapters of {source.path}: {differing[:3]} are not in both")
    try:
        model.load_state_dict(adapters, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: these are not adapters of {source.path}: {reason}") from error
    merge_adapters(model)
    return model


def _initial(source: ModelConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return pretrained_model(load_hf_config(source), source, dtype=dtype)


def _model_config(run_dir: Path) -> ModelConfig:
    file = config_of_run(run_dir)
    # Read the section `model` only: other sections may have redacted secrets, which load_config refuses.
    section = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(file).model)
    return OmegaConf.to_object(section)  # type: ignore[return-value]
