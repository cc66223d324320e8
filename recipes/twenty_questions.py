"""Twenty questions about animals: an environment with two tools, `ask` and `guess`."""

from __future__ import annotations

PROPERTIES = (
    "mammal", "bird", "fish", "insect", "reptile", "flies", "swims", "has four legs", "has fur", "lays eggs", "eats meat",
    "is larger than a person", "lives in water", "lives on farms", "is kept as a pet", "lives in cold places", "has stripes",
    "has horns",
)  # fmt: skip
# animal: numbers of the properties that it has
ANIMALS = {
    "dog": (0, 6, 7, 8, 10, 14),
    "cat": (0, 7, 8, 10, 14),
    "cow": (0, 7, 8, 11, 13, 17),
    "horse": (0, 6, 7, 8, 11, 13),
    "sheep": (0, 7, 8, 13),
    "goat": (0, 7, 8, 13, 17),
    "pig": (0, 7, 13),
    "tiger": (0, 6, 7, 8, 10, 11, 16),
    "zebra": (0, 7, 8, 11, 16),
    "polar bear": (0, 6, 7, 8, 10, 11, 15),
    "seal": (0, 6, 8, 10, 12, 15),
    "whale": (0, 6, 10, 11, 12),
    "bat": (0, 5, 8),
    "rabbit": (0, 7, 8, 14),
    "elephant": (0, 6, 7, 11),
    "reindeer": (0, 7, 8, 11, 15, 17),
    "chicken": (1, 9, 13),
    "duck": (1, 5, 6, 9, 13),
    "parrot": (1, 5, 9, 14),
    "eagle": (1, 5, 9, 10),
    "penguin": (1, 6, 9, 10, 15),
    "ostrich": (1, 9, 11),
    "goldfish": (2, 6, 9, 12, 14),
    "shark": (2, 6, 10, 11, 12),
    "salmon": (2, 6, 9, 10, 12),
    "clownfish": (2, 6, 9, 12, 16),
    "bee": (3, 5, 9, 13, 16),
    "ant": (3, 9),
    "butterfly": (3, 5, 9),
    "dragonfly": (3, 5, 9, 10),
    "turtle": (4, 6, 7, 9, 14),
    "crocodile": (4, 6, 7, 9, 10, 11, 12),
    "snake": (4, 9, 10),
    "lizard": (4, 7, 9, 10),
    "chameleon": (4, 7, 9, 10, 14),
    "wolf": (0, 6, 7, 8, 10),
}
HELD_OUT = ("goat", "seal", "rabbit", "eagle", "salmon", "dragonfly", "snake", "wolf")
QUESTIONS = 20
COST = 0.02
"""Of a question."""


class TwentyQuestions:
    """The game. An episode hides one animal, and ends with a guess or when the model calls nothing more."""

    def reset(self, animal: str, **row) -> str:
        """Begin a game; the answer tells what may be asked."""
        self.animal, self.asked, self.guessed = animal, 0, None
        return f" The properties are: {', '.join(PROPERTIES)}. The animals are: {', '.join(sorted(ANIMALS))}."

    def ask(self, property: str) -> str:
        """Ask whether the animal has a property.

        Args:
            property: One of the properties, as they are listed.
        """
        if self.guessed is not None:
            return "the game is over"
        if property not in PROPERTIES:
            raise ValueError(f"there is no property {property!r}")
        if self.asked == QUESTIONS:
            return "no questions are left; guess"
        self.asked += 1
        return "yes" if PROPERTIES.index(property) in ANIMALS[self.animal] else "no"

    def guess(self, animal: str) -> str:
        """Guess the animal. There is one guess.

        Args:
            animal: Its name.
        """
        if self.guessed is not None:
            return "the game is over"
        self.guessed = animal.strip().lower()
        return "right" if self.guessed == self.animal else f"wrong, it was the {self.animal}"

    def get_reward(self) -> float:
        """1 for a right guess, less what the questions cost; 0 for a wrong one or none."""
        return 1.0 - COST * self.asked if self.guessed == self.animal else 0.0


def rows(split: str) -> list[dict]:
    """Games of one split, each animal many times in training, so that a step has enough rows.

    Args:
        split: `train` or `eval`.

    Returns:
        One dict a game: ``animal`` (text).
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: the splits are train and eval")
    chosen = [animal for animal in ANIMALS if (animal in HELD_OUT) == (split == "eval")]
    return [{"animal": animal, "game": game} for game in range(1 if split == "eval" else 16) for animal in chosen]
