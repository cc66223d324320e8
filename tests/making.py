"""Episodes and groups for tests; what a test does not name is filled in."""

from pgrpo.types import Episode, FinishReason, Group, Prompt, Sample


def episode(
    token_ids,
    reward=None,
    *,
    mask=None,
    logprobs=None,
    advantage=None,
    finish_reason: FinishReason = "stop",
    text="",
    parts=None,
):
    """One sample of these tokens, behind a prompt that ``group`` gives it."""
    count = len(token_ids)
    advantages = [] if advantage is None else [advantage] * count
    sample = Sample([], token_ids, mask or [True] * count, logprobs or [0.0] * count, advantages=advantages)
    return Episode([sample], text, finish_reason, reward, parts or {})


def group(prompt, *episodes):
    """``prompt``: its tokens, or a ``Prompt``."""
    prompt = prompt if isinstance(prompt, Prompt) else Prompt(0, "", prompt)
    for one in episodes:
        for sample in one.samples:
            sample.prompt_ids = prompt.token_ids
    return Group(prompt, list(episodes))
