"""Files of a run's record. Errors name the file; symbolic links are not followed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pgrpo.types import Episode, Prompt
from pgrpo.vision.parts import as_text

TRAINING = "training stops without its record; {fix}, then --resume auto"


@contextmanager
def writing(path: str | Path, advice: str = TRAINING) -> Iterator[None]:
    """Turn an ``OSError`` of a write, which does not name the file, into an error that does.

    Args:
        advice: end of the message, with ``{fix}`` for the remedy of the system's error.

    Raises:
        RuntimeError: writing failed; the message names the file and the remedy.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = "make room" if is_full else f"see that {Path(path).parent} is there and can be written to"
        fix = "remove the symbolic link" if error.errno == errno.ELOOP else fix
        raise RuntimeError(f"{path}: cannot be written ({error.strerror}); {advice.format(fix=fix)}") from error


def appending(path: Path) -> IO[str]:
    """Open a file to append lines; each line is written at once. A lone surrogate becomes its JSON escape."""
    with writing(path):
        return open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1, opener=_not_through_a_link)


@contextmanager
def replacing(path: Path, advice: str = TRAINING) -> Iterator[IO[str]]:
    """Write ``path`` atomically: the file replaces it at the end of the block. ``advice``: see ``writing``."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, advice):
        part.unlink(missing_ok=True)
        try:
            with open(part, "x", encoding="utf-8", errors="backslashreplace") as file:
                yield file
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _not_through_a_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def shown(prompt: Prompt, episode: Episode) -> dict[str, Any]:
    """What a record says of an episode of ``prompt``, for a reader: its prompt, all turns as one text, and the turns."""
    turns = {"messages": [m | {"content": as_text(m["content"])} for m in episode.messages]} if episode.messages else {}
    lines = (line for message in episode.messages for line in _lines(message))
    return {"prompt": (episode.prompt or prompt).text, "completion": "\n".join(lines) or episode.text, **turns}


def _lines(message: dict[str, Any]) -> Iterator[str]:
    """A message as lines of ``[role] text``; a call is ``[call] name {arguments}``."""
    said = f"{message.get('reasoning_content', '')}\n{as_text(message['content'])}".strip()
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if said or not calls:
        yield f"[{message['role']}{' ' + message['name'] if message.get('name') else ''}] {said}"
    for call in calls:
        yield f"[call] {call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}"
