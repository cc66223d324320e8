"""Checks that the model of ``loss.teacher`` can teach this policy, before its weights are loaded."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pgrpo.admission.fits import check_heads, check_positions
from pgrpo.admission.linear import check_linear
from pgrpo.admission.models import check_model
from pgrpo.admission.proof import Proof
from pgrpo.admission.rows import check_rows
from pgrpo.config import Config, ConfigError
from pgrpo.placement.choices import attention_choice, teacher_model
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.hub import load_error, load_hf_config


def check_teacher(config: Config, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device) -> Proof:
    """The teacher reads the batch that is packed for the policy, so it must have the same tokens, and run on the same kernel.

    Args:
        tokenizer, vocab_size: the policy's. The teacher's vocabulary may be larger, as some models pad it, but not smaller.

    Returns:
        Its proof.

    Raises:
        ConfigError: names what differs.
    """
    model, longest = teacher_model(config), config.max_sample_tokens
    try:
        hf_config = load_hf_config(model)
        check_positions(model, hf_config, longest, config.sampled_limit)
        check_linear(model.path, hf_config, device)
        proof = check_model(model.path, hf_config, longest)
    except ConfigError as error:
        raise ConfigError(
            str(error).partition(", or set model.")[0].replace("model.path", "loss.teacher", 1)
        ) from error
    name = f"loss.teacher={model.path}"
    try:
        theirs = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code).get_vocab()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name}: cannot load its tokenizer, which must be the policy's: {load_error(error)}"
        ) from error
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            has = "does not have it" if token not in theirs else f"has it as {theirs[token]}"
            raise ConfigError(
                f"{name}: it has other tokens than model.path={config.model.path}: {token!r} is {number} there, and the teacher "
                f"{has}; name a teacher of the same family"
            )
    if (size := hf_config.get_text_config().vocab_size) < vocab_size:
        raise ConfigError(
            f"{name}: its vocabulary of {size} ids is smaller than the policy's, {vocab_size}; name a teacher of the same family"
        )
    dims = ModelDims.from_config(hf_config)
    try:
        check_heads(together := config.model.sequence_parallel_size, dims)
        check_rows(model.path, hf_config, longest, together)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    own = attention_choice(config, ModelDims.from_config(load_hf_config(config.model)), device).kernel
    if (kernel := attention_choice(config, dims, device).kernel) != own:
        raise ConfigError(
            f"{name}: its head dim {dims.head_dim} needs the attention kernel {kernel}, the policy's is {own}; "
            f"set model.attention_kernel={'builtin' if 'builtin' in (kernel, own) else kernel}"
        )
    return proof
