"""Which models may be trained: those on which grouped attention is proven (``proof.py``). There is no list of them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig

from pgrpo.admission.proof import Proof, prove
from pgrpo.admission.reach import long_sample
from pgrpo.admission.shrink import DROPOUT, shrink
from pgrpo.config import ConfigError
from pgrpo.model.families.experts import balance_refusal
from pgrpo.planning.hub import code_folder

log = logging.getLogger(__name__)

UNUSED = ("summary", "classif")
"""Parts of names of dropouts of heads that a language model does not have."""


def check_model(path: str, config: PretrainedConfig, max_sample: int) -> Proof:
    """Refuse a model on which grouped attention is not proven, before any weight is loaded. Proofs are kept in files, by a hash
    of the small config, of versions and of this package's own code.

    Args:
        path: ``model.path``, for the message.
        config: of the model.
        max_sample: the longest sample of the run.

    Raises:
        ConfigError: its weights are quantized, it has dropout, asks for a load-balancing term, or its proof failed or took too
            long.
    """
    for name, value in config.get_text_config().to_dict().items():
        if is_dropout(name) and isinstance(value, float) and value > 0:
            raise ConfigError(
                f"model.path={path}: {name}={value}: rows that samples share cannot have dropout: set it to 0 in its config.json"
            )
    if quantization := getattr(config, "quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"model.path={path}: its checkpoint's weights are quantized ({method}), which cannot be trained: give one in bfloat16"
        )
    if refusal := balance_refusal(config):
        raise ConfigError(f"model.path={path}: {refusal}")
    proof = _kept_proof(config, max_sample)
    if proof.refusal:
        raise ConfigError(
            f"model.path={path}: grouped attention is not proven on this {config.model_type} model: {proof.refusal}"
        )
    return proof


def is_dropout(name: str) -> bool:
    """Whether a key of a config is a probability of dropout in a language model."""
    return any(part in name for part in DROPOUT) and not any(part in name for part in UNUSED)


def _kept_proof(config: PretrainedConfig, max_sample: int) -> Proof:
    try:
        whole = shrink(config, max_sample, all_layers=True)
        file = cache_file(shrink(config, max_sample), whole.to_json_string(), f"{long_sample(max_sample)}")
    except Exception:  # prove() says why
        return prove(config, max_sample)
    if file.name in _proven:
        return _proven[file.name]
    try:
        proof = Proof(**json.loads(file.read_text()))
        log.info("%s (kept in %s)", proof, file)
    except (OSError, ValueError, TypeError):
        proof = prove(config, max_sample)
        if not proof.refusal:
            log.info("%s", proof)
            with suppress(OSError):  # a home that is read-only costs a proof a run
                file.parent.mkdir(parents=True, exist_ok=True)
                own = file.with_suffix(f".{os.getpid()}")  # ranks write at the same time
                own.write_text(json.dumps(asdict(proof)))
                own.replace(file)
    _proven[file.name] = proof
    return proof


_proven: dict[str, Proof] = {}


def cache_file(config: PretrainedConfig, *more: str, also: Sequence[str] = ()) -> Path:
    """Where a proof is kept. The name is a hash of all that it depends on: the config (and ``more``), libraries, this package
    (of its folders those of a proof, and ``also``), and the code of a remote model."""
    folders = [
        Path(__file__).parents[1] / name
        for name in ("admission", "attention", "packing", "model", "planning", "vision", *also)
    ]
    if remote := code_folder(config):
        folders.append(remote)
    code = hashlib.sha256()
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        code.update(file.read_bytes())
    values = json.dumps(config.to_dict(), sort_keys=True, default=str)
    known = values, *more, torch.__version__, transformers.__version__, code.hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgrpo" / "proofs"
    return folder / f"{hashlib.sha256(repr(known).encode()).hexdigest()[:32]}.json"
