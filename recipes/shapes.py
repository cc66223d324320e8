"""Pictures of coloured shapes with a question each: how many, which colour, which corner. Drawn with Pillow, not downloaded."""

from __future__ import annotations

import random
from typing import Any

SIZES = {"train": 2_000, "eval": 200}
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 200, 40)}
KINDS = ("circle", "square", "triangle")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
SIDE, CELL = 64, 32


def rows(split: str) -> list[dict]:
    """Questions of one split, the same ones each time.

    Args:
        split: `train` or `eval`.

    Returns:
        One dict a question: ``images`` (a list of one Pillow image of 64 x 64 pixels), ``question`` and ``answer`` (a word or two).
    """
    if split not in SIZES:
        raise ValueError(f"split {split!r}: the splits are train and eval")
    draw = random.Random(f"shapes/{split}")
    return [_row(draw, ("count", "colour", "corner")[i % 3]) for i in range(SIZES[split])]


def _row(draw: random.Random, task: str) -> dict:
    """Up to four shapes of one colour, each in a corner of its own."""
    colour = draw.choice(list(COLOURS))
    count = draw.randint(1, 4) if task != "corner" else 1
    corners = draw.sample(range(4), count)
    picture = picture_of([(corner, draw.choice(KINDS)) for corner in corners], colour, draw)
    question, answer = {
        "count": ("how many shapes?", str(count)),
        "colour": ("which colour?", colour),
        "corner": ("which corner?", CORNERS[corners[0]]),
    }[task]
    return {"images": [picture], "question": question, "answer": answer}


def picture_of(shapes: list[tuple[int, str]], colour: str, draw: random.Random) -> Any:
    """A picture of (corner, kind) shapes on a light ground."""
    from PIL import Image, ImageDraw

    ground = draw.randint(225, 255)
    picture = Image.new("RGB", (SIDE, SIDE), (ground, ground, ground))
    pen = ImageDraw.Draw(picture)
    for corner, kind in shapes:
        size = draw.randint(16, 24)
        x = corner % 2 * CELL + draw.randint(2, CELL - size - 2)
        y = corner // 2 * CELL + draw.randint(2, CELL - size - 2)
        box = (x, y, x + size, y + size)
        if kind == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif kind == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLOURS[colour])
    return picture
