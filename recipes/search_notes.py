"""Retrieval over the notes of a small harbour town. Each question needs two notes: who somebody is, and what that leads to."""

from __future__ import annotations

import math
import re
from collections import Counter

# place: its keeper, the hour it opens, what is kept there, the street
PLACES = {
    "lighthouse": ("Ada Brandt", "six", "a brass lens", "Cliff Road"),
    "bakery": ("Bruno Keller", "five", "a stone oven", "Mill Lane"),
    "library": ("Clara Voss", "nine", "old sea charts", "Church Square"),
    "ferry office": ("David Ohm", "seven", "the tide tables", "Harbour Street"),
    "smithy": ("Elsa Lind", "eight", "a steam hammer", "Anchor Alley"),
    "apothecary": ("Felix Maro", "ten", "a cabinet of herbs", "Church Square"),
    "boatyard": ("Greta Holm", "half past six", "two unfinished cutters", "Slipway"),
    "school": ("Henrik Falk", "half past eight", "a globe", "Hill Road"),
    "fish market": ("Ines Carlo", "four", "the big scale", "Harbour Street"),
    "chapel": ("Jonas Weiss", "noon", "a silver bell", "Hill Road"),
    "post office": ("Karin Storm", "half past seven", "the telegraph", "Mill Lane"),
    "museum": ("Lars Tofte", "eleven", "a whale's jaw", "Cliff Road"),
}
# person: the place where they work, their pet, the instrument they play
PEOPLE = {
    "Mira": ("lighthouse", "a parrot", "the fiddle"),
    "Nils": ("bakery", "a tabby cat", "the flute"),
    "Olga": ("library", "a tortoise", "the cello"),
    "Pablo": ("ferry office", "a terrier", "the drum"),
    "Quinn": ("smithy", "a raven", "the horn"),
    "Rosa": ("apothecary", "a white rabbit", "the harp"),
    "Sven": ("boatyard", "a goat", "the concertina"),
    "Tilda": ("school", "a canary", "the organ"),
    "Ulf": ("fish market", "a black cat", "the whistle"),
    "Vera": ("chapel", "a hedgehog", "the lute"),
    "Willem": ("post office", "a carrier pigeon", "the trumpet"),
    "Xenia": ("museum", "a newt", "the viola"),
    "Yann": ("boatyard", "a spaniel", "the bagpipe"),
    "Zora": ("library", "a grey cat", "the piano"),
    "Albin": ("bakery", "a hen", "the banjo"),
    "Berta": ("fish market", "a seagull", "the accordion"),
    "Cyril": ("smithy", "a ferret", "the oboe"),
    "Dora": ("school", "a snail", "the guitar"),
}
HELD_OUT = ("Quinn", "Rosa", "Willem", "Zora", "Berta", "Dora")
QUESTIONS = (
    ("Who keeps the place where {name} works?", 0),
    ("At what hour does the place where {name} works open?", 1),
    ("What is kept at the place where {name} works?", 2),
    ("In which street is the place where {name} works?", 3),
    ("Who keeps the place where the owner of {pet} works?", 0),
    ("At what hour does the place open where the owner of {pet} works?", 1),
    ("In which street does the person work who plays {instrument}?", 3),
    ("What is kept where the person works who plays {instrument}?", 2),
)


def _notes() -> dict[str, str]:
    notes = {}
    for place, (keeper, hour, thing, street) in PLACES.items():
        notes[f"the {place}"] = (
            f"The {place} is in {street}. Its keeper is {keeper}. The doors open at {hour}. Visitors ask to see {thing}, which is "
            "kept there."
        )
    for name, (place, pet, instrument) in PEOPLE.items():
        notes[name] = f"{name} works at the {place}, has {pet} at home, and plays {instrument} on feast days."
    return notes


NOTES = _notes()


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


_BAGS = {title: Counter(_words(f"{title} {text}")) for title, text in NOTES.items()}
_IN = Counter(word for bag in _BAGS.values() for word in bag)


def search(query: str, most: int = 3) -> str:
    """Search the notes of the town. Gives the titles of the notes that fit best, with their first words.

    Args:
        query: Words to look for, such as a name or a thing.
        most: How many notes to list, 1 to 5.
    """
    scores = {
        title: sum(math.log(1 + len(NOTES) / _IN[word]) for word in set(_words(query)) if word in bag)
        for title, bag in _BAGS.items()
    }
    best = sorted((title for title in scores if scores[title]), key=lambda title: (-scores[title], title))
    found = [f"{title}: {' '.join(NOTES[title].split()[:5])} ..." for title in best[: max(1, min(5, most))]]
    return "\n".join(found) or "nothing fits"


def read(title: str) -> str:
    """Read one note.

    Args:
        title: The title of the note, as the search gives it.
    """
    by_name = {name.lower(): name for name in NOTES}
    name = by_name.get(title.strip().lower()) or by_name.get(f"the {title.strip().lower()}")
    return NOTES[name] if name else f"there is no note {title!r}; search for one"


def rows(split: str) -> list[dict]:
    """Questions of one split, the same ones each time; no person is in both.

    Args:
        split: `train` or `eval`.

    Returns:
        One dict a question: ``question`` and ``answer`` (text).
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split {split!r}: the splits are train and eval")
    found = []
    for name, (place, pet, instrument) in PEOPLE.items():
        if (name in HELD_OUT) == (split == "eval"):
            for question, field in QUESTIONS:
                text = question.format(name=name, pet=pet, instrument=instrument)
                found.append({"question": text, "answer": PLACES[place][field]})
    return found
