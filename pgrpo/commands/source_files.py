"""What an export takes over from the initial model: its own config, tokenizer and licence, byte by byte but for the precision.

transformers 5 rewrites these files in a form that transformers 4 reads without a warning as another model: RoPE's base and scaling
fall back to defaults, and the tokenizer does not load."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pgrpo.config import ConfigError, ModelConfig
from pgrpo.config.strict_yaml import one_line

TAKEN = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "additional_chat_templates/*",
)
LEFT = ("*.index.json", "adapter_config.json", "trainer_state.json", ".*")
DTYPE_KEYS = ("dtype", "torch_dtype")


def source_folder(source: ModelConfig) -> Path:
    """The folder of the initial model, or of these files of it in the hub's cache.

    Raises:
        ConfigError: ``model.path`` is not there.
    """
    if (folder := Path(source.path)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=list(TAKEN)))
    except (OSError, ValueError) as error:
        what = f"model.path={source.path}: its config and tokenizer cannot be copied"
        raise ConfigError(f"{what}: {one_line(error)}") from error


def copy_source_files(folder: Path, out: Path, dtype: str, model_type: str) -> None:
    """Replace everything in ``out`` but weights by the files of the initial model.

    Args:
        folder: of the initial model.
        out: what ``save_pretrained`` has written.
        dtype: of the weights in ``out``.
        model_type: of their model. Where the initial model's config is of another type, as of a model with images whose text model
            was trained, the config that is in ``out`` stays.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keeps_config = config.get("model_type") != model_type
    for file in out.iterdir():
        if not file.name.endswith((".safetensors", ".safetensors.index.json")) and not (
            keeps_config and file.name == "config.json"
        ):
            file.unlink()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        taken = any(_matches(name, pattern) for pattern in TAKEN) and not any(fnmatchcase(file.name, p) for p in LEFT)
        if taken and file.is_file() and not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)
    if not keeps_config:
        _set_dtype(config, dtype)
        (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _set_dtype(config: dict[str, Any], dtype: str, *, is_top: bool = True) -> None:
    """In the key that the file has, for the parts of the model too; ``torch_dtype``, which every version reads, if it has none."""
    keys = [key for key in DTYPE_KEYS if key in config] or (["torch_dtype"] if is_top else [])
    config.update(dict.fromkeys(keys, dtype))
    for part in config.values():
        if isinstance(part, dict):
            _set_dtype(part, dtype, is_top=False)
