"""Guess a number, told `higher` or `lower`: an environment that leads the conversation, so any chat model can play it."""

from __future__ import annotations

import random
import re

WIDTH = 31
"""Numbers in a range. Halving it finds any of them in five guesses at most, in 4.2 on average."""
GUESSES = 6
COST = 0.05
"""Of each guess but the first."""
TRY = 0.3
"""What a lost game is worth if each guess could have been right after all that was said."""


class GuessNumber:
    """The game. An episode hides one number, and ends when the model says it or has no guesses left."""

    def reset(self, number: int, low: int, high: int, **row) -> None:
        self.number, self.low, self.high = number, low, high
        self.guesses, self.possible, self.found = 0, 0, False

    async def converse(self, conversation) -> None:
        while not self.found:
            said = await conversation.generate()
            answer = self.answer(said.content)
            if self.guesses == GUESSES:
                return
            if not self.found:
                conversation.say(answer)

    def answer(self, text: str) -> str:
        self.guesses += 1
        match = re.fullmatch(r"\D*(\d{1,6})\D*", text)  # one number, and no more
        if match is None:
            return "Write one number."
        guess = int(match[1])
        self.possible += self.low <= guess <= self.high
        self.found = guess == self.number
        if guess < self.number:
            self.low = max(self.low, guess + 1)
            return "Higher."
        self.high = min(self.high, guess - 1)
        return "Lower."

    def get_reward(self) -> float:
        """1 for the number, less what the guesses cost; for a lost game, a share of ``TRY``."""
        return 1.0 - COST * (self.guesses - 1) if self.found else TRY * self.possible / GUESSES


def rows(split: str) -> list[dict]:
    """All games of one split (1,798 to train on, 341 held out), the same ones each time; no range is in both splits.

    Args:
        split: `train` or `eval`.

    Returns:
        One dict a game: ``low`` and ``high`` (int, the range) and ``number`` (int, which the game hides).
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: the splits are train and eval")
    lows = [low for low in range(1, 70) if (low % 6 == 0) == (split == "eval")]
    games = [{"low": low, "high": low + WIDTH - 1, "number": low + n} for low in lows for n in range(WIDTH)]
    random.Random(0).shuffle(games)
    return games
