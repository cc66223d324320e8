"""A reward model: a transformers sequence classifier that scores prompt and completion."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pgrpo.rewards.call import Unusable
from pgrpo.types import Messages
from pgrpo.vision.parts import as_text


class RewardModel:
    """The classifier's raw logit; scale it with the reward's weight. Every rank loads the model at its first batch and keeps it."""

    __name__ = "reward_model"

    def __init__(self) -> None:
        self._loaded: tuple[Any, ...] | None = None

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        messages: list[Messages] | None = None,
        *,
        model: str,
        revision: str | None = None,
        label: int = 0,
        batch_size: int = 8,
        max_tokens: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> list[float | Exception]:
        """Score the completions. A chat prompt is rendered with the reward model's own chat template, a raw prompt is used as is.

        Args:
            model: folder or hub name of a sequence classifier.
            revision: branch, tag or commit.
            label: index of the logit. Most reward models have one logit.
            batch_size: texts per forward pass.
            max_tokens: maximum length of a text (None: the model's own). A longer text is never truncated; it fails the sample.
            device: None takes this rank's GPU, or the CPU if there is none. The memory plan does not include the reward model:
                beside vLLM a GPU has a few GiB free unless ``rollout.gpu_memory_utilization`` is lowered.
            dtype: dtype of the weights: `auto` (as stored), `float32`, `bfloat16`.
            trust_remote_code: run Python code that comes with the model. If false, such a model is refused.

        Raises:
            Unusable: the GPU has not enough memory, or there are no weights for some of the classifier's tensors.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        tokenizer, limit = _tokenizer(model, revision, trust_remote_code, label, max_tokens)
        if not completions:
            return []  # only the check of the arguments: load no weights
        key = (model, revision, trust_remote_code, device, dtype)
        if self._loaded is None or self._loaded[0] != key:
            with _out_of_memory_named(model):
                self._loaded = (key, _load(*key))
        classifier = self._loaded[1]
        ids = _tokenize(tokenizer, prompts, completions, messages)
        scores: list[float | Exception] = [
            ValueError(f"prompt and completion have {len(row)} tokens for {model}, max_tokens is {limit}")
            for row in ids
        ]
        order = sorted((i for i, row in enumerate(ids) if len(row) <= limit), key=lambda i: len(ids[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            with _out_of_memory_named(model):
                logits = _logits(classifier, tokenizer, [ids[i] for i in rows])
            for i, values in zip(rows, logits, strict=True):
                scores[i] = values[label]
        return scores


@contextmanager
def _out_of_memory_named(model: str) -> Iterator[None]:
    """Convert out-of-memory errors to ``Unusable`` with the fix."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Unusable(
            f"the GPU has not enough memory for {model} ({str(error).splitlines()[0]}); lower rollout.gpu_memory_utilization (or "
            "args.batch_size), or set args.device: cpu"
        ) from error


def _tokenizer(model: str, revision: str | None, trust: bool, label: int, max_tokens: int | None) -> tuple[Any, int]:
    """Return the tokenizer and the maximum length in tokens. ValueError if there is no such model or label."""
    from transformers import AutoConfig, AutoTokenizer

    try:  # always pass trust_remote_code: without it transformers asks on the terminal
        config: Any = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        fix = "read it, and set args.trust_remote_code: true to run it"
        raise ValueError(f"{model} comes with Python code of its own; {fix}") from None
    if not 0 <= label < config.num_labels:
        raise ValueError(f"{model} has {config.num_labels} labels; there is no label {label}")
    positions = getattr(config, "max_position_embeddings", None) or 1 << 30
    limit = min(positions, int(min(tokenizer.model_max_length, 1 << 30)))
    if max_tokens is not None and not 1 <= max_tokens <= limit:
        raise ValueError(f"max_tokens must be from 1 to {limit}, the limit of {model}, not {max_tokens}")
    return tokenizer, max_tokens or limit


def _load(model: str, revision: str | None, trust: bool, device: str | None, dtype: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    found: Any = AutoModelForSequenceClassification.from_pretrained(
        model, revision=revision, trust_remote_code=trust, dtype=dtype, output_loading_info=True
    )
    classifier, info = found
    if missing := sorted(info["missing_keys"]):
        raise Unusable(
            f"{model} has no weights for {len(missing)} of a classifier's tensors, such as {missing[0]}, and transformers gives "
            "these random numbers; set args.model to a sequence classifier that was trained as a reward model"
        )
    return classifier.to(device).eval()


def _tokenize(
    tokenizer: Any, prompts: list[str], completions: list[str], messages: list[Messages] | None
) -> list[list[int]]:
    if messages is None or tokenizer.chat_template is None:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return tokenizer(texts, verbose=False)["input_ids"]
    chats = []
    for chat, completion in zip(messages, completions, strict=True):
        chat = [message | {"content": as_text(message["content"])} for message in chat]
        chat, begun = (chat[:-1], chat[-1]["content"]) if chat[-1]["role"] == "assistant" else (chat, "")
        chats.append([*chat, {"role": "assistant", "content": begun + completion}])
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    # The chat template already wrote bos and other special tokens, so the tokenizer must not add them again.
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


@torch.inference_mode()
def _logits(classifier: Any, tokenizer: Any, rows: list[list[int]]) -> list[list[float]]:
    """Return the logits of every row, padded on the right.

    Decoder classifiers pool at the last token that is not the config's pad id. If the tokenizer has no pad token, pad with an id
    that no row contains; eos would be wrong, because a text may end with it.
    """
    used = {token for row in rows for token in row}
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = next(token for token in range(len(used) + 1) if token not in used)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=classifier.device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=classifier.device)
    classifier.config.pad_token_id = pad
    return classifier(input_ids=ids, attention_mask=mask).logits.float().tolist()
