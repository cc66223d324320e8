"""The recipes with tools as shipped: their tools in worker processes, played by an engine that says a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from playing import call, play, printable_tokenizer, turns

from pgrpo.config import load_config
from pgrpo.config.functions import load_function
from pgrpo.sandbox.find import find_sandbox
from pgrpo.sandbox.run import SandboxError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
TOKENIZER = printable_tokenizer()
PLAYED: dict[str, Any] = {"tokenizer": TOKENIZER, "prompt": 4096, "turn": 600, "episode": 5000}


def as_shipped(name: str) -> dict[str, Any]:
    """What ``play`` takes of a recipe's own tools and limits."""
    config = load_config("smollm2_135m", [f"recipe={name}", "train.token_budget=8192"])
    limits = {"max_turns": config.environment.max_turns, "max_tool_calls": config.environment.max_tool_calls}
    return PLAYED | limits | {"tools": config.tools, "environment": config.environment.factory}


def rows_of(name: str, split: str) -> list[dict[str, Any]]:
    return load_function(f"{RECIPES / name}.py:rows", "test")(split)


def said(episode: Any) -> list[str]:
    return [m["content"] for m in episode.messages if m["role"] == "tool"]


def test_search_notes_is_answered_from_two_notes():
    script = turns(
        f"{call('search', query='Mira')}<|im_end|>",
        f"{call('read', title='Mira')}{call('read', title='lighthouse')}<|im_end|>",
        f"{call('read', title='nowhere')}{call('search', query='qqq', most=9)}<|im_end|>",
        "Ada Brandt<|im_end|>",
    )
    ((episode,),), _ = play(script, **as_shipped("search_notes"))
    first, mira, light, nowhere, nothing = said(episode)
    assert first.startswith("Mira: Mira works at the lighthouse,")
    assert "has a parrot at home" in mira and "keeper is Ada Brandt. The doors open at six." in light
    assert (nowhere, nothing) == ("there is no note 'nowhere'; search for one", "nothing fits")
    assert episode.text == "Ada Brandt" and episode.counts["failures"] == 0


def test_every_question_of_search_notes_can_be_answered_with_its_tools():
    module = load_function(f"{RECIPES}/search_notes.py:rows", "test").__globals__
    for split in ("train", "eval"):
        for row in rows_of("search_notes", split):
            hits = [line.partition(":")[0] for line in module["search"](row["question"], 5).splitlines()]
            person = next(title for title in hits if title in module["PEOPLE"])
            place = f"the {module['PEOPLE'][person][0]}"
            assert place in module["NOTES"][person] and row["answer"] in module["NOTES"][place], row
            assert place in module["search"](place, 5)


def test_a_game_of_twenty_questions():
    moves = [
        call("ask", property="mammal"), call("ask", property="is blue"), call("ask", property="flies"),
        call("guess", animal="Bat"), call("ask", property="bird"),
    ]  # fmt: skip
    script = turns(*[f"{move}<|im_end|>" for move in moves], "done<|im_end|>")
    rows = [{"animal": "bat"}, {"animal": "dog"}]
    (won, lost), _ = play(script, rows=rows, **as_shipped("twenty_questions"))
    assert said(won[0]) == [
        "yes",
        '{"error": "ValueError: there is no property \'is blue\'"}',
        "yes",
        "right",
        "the game is over",
    ]
    assert said(lost[0])[2:4] == ["no", "wrong, it was the dog"]
    assert (
        won[0].own_rewards == {"TwentyQuestions": pytest.approx(0.96)} and lost[0].own_rewards["TwentyQuestions"] == 0
    )
    assert won[0].counts["turns"] == 6 and won[0].prompt is not None


def test_a_number_is_guessed_in_a_conversation_that_the_environment_leads():
    row, shipped = {"low": 10, "high": 40, "number": 23}, as_shipped("guess_number")
    script = turns("20<|im_end|>", "is it 25?<|im_end|>", "22 or 23<|im_end|>", "23<|im_end|>")
    ((won,),), _ = play(script, rows=[row], **shipped)
    assert [m["content"] for m in won.messages if m["role"] == "user"] == ["Higher.", "Lower.", "Write one number."]
    assert won.own_rewards == {"GuessNumber": pytest.approx(0.85)} and won.finish_reason == "stop"
    script = turns(*[f"{n}<|im_end|>" for n in (25, 30, 20, 22, 9, 23)])
    ((lost,),), _ = play(script, rows=[row | {"number": 24}], **shipped)
    assert [m["role"] for m in lost.messages] == ["assistant", "user"] * 5 + ["assistant"]
    # 30 and 9 were out of the range that was left.
    assert lost.own_rewards == {"GuessNumber": pytest.approx(0.3 * 4 / 6)} and lost.counts["turns"] == 6


def test_halving_finds_every_number_of_guess_number_in_five_guesses():
    module = load_function(f"{RECIPES}/guess_number.py:rows", "test").__globals__
    worth = []
    for row in rows_of("guess_number", "eval")[:31]:
        game, low, high = module["GuessNumber"](), row["low"], row["high"]
        game.reset(**row)
        while not game.found:
            middle = (low + high) // 2
            said = game.answer(str(middle))
            low, high = (middle + 1, high) if said == "Higher." else (low, middle - 1)
        assert game.guesses <= 5
        worth.append((game.get_reward(), 1 - 0.05 * (game.guesses - 1)))
    assert all(a == pytest.approx(b) for a, b in worth)


def test_no_two_animals_are_alike_and_questions_end():
    module = load_function(f"{RECIPES}/twenty_questions.py:rows", "test").__globals__
    assert len(set(module["ANIMALS"].values())) == len(module["ANIMALS"])
    game = module["TwentyQuestions"]()
    game.reset(animal="ant")
    assert [game.ask("insect") for _ in range(21)] == ["yes"] * 20 + ["no questions are left; guess"]
    game.guess("ant")
    assert game.get_reward() == pytest.approx(1 - 20 * 0.02)


def test_code_is_repaired_in_the_sandbox():
    try:
        find_sandbox()
    except SandboxError as error:
        pytest.skip(str(error))
    row = next(row for row in rows_of("code_repair", "train") if row["name"] == "clamp" and "x > low" in row["program"])
    right = row["program"].replace("x > low", "x < low", 1)
    moves = [call("run_tests", program=p) for p in (row["program"], "def clamp(:", right)]
    script = turns(*[f"{move}<|im_end|>" for move in moves], "done<|im_end|>")
    rows = [row, row | {"program": "nothing"}]
    (mended, _), _ = play(script, rows=rows, **as_shipped("code_repair"))
    first, second, third = said(mended[0])
    assert first.splitlines() == [f"failed: {test}" for test in row["tests"]]
    assert second.startswith("the program did not finish") or second.count("failed") == 2
    assert third.splitlines() == [f"passed: {test}" for test in row["tests"]]
    assert mended[0].own_rewards == {"CodeRepair": 1.0}


def test_every_mistake_of_code_repair_fails_a_test_and_every_program_passes():
    programs = load_function(f"{RECIPES}/code_repair.py:rows", "test").__globals__["PROGRAMS"]

    def passes(program: str, tests: list[str]) -> int:
        names: dict[str, Any] = {}
        exec(program, names)
        count = 0
        for test in tests:
            try:
                exec(test, names)
                count += 1
            except Exception:
                pass
        return count

    for row in (*rows_of("code_repair", "train"), *rows_of("code_repair", "eval")):
        right = programs[row["name"]][1]
        assert passes(right, row["hidden"]) == len(row["hidden"]), row["name"]
        assert row["program"] != right
        assert passes(row["program"], row["hidden"]) < len(row["hidden"]), row["program"]


@pytest.mark.parametrize("name", ["search_notes", "twenty_questions", "code_repair", "guess_number"])
def test_rows_are_the_same_each_time_and_disjoint(name):
    train, held_out = rows_of(name, "train"), rows_of(name, "eval")
    assert train == rows_of(name, "train") and len(train) >= 64 and len(held_out) >= 8
    key = {"search_notes": "question", "twenty_questions": "animal", "code_repair": "program", "guess_number": "low"}[
        name
    ]
    assert not {row[key] for row in train} & {row[key] for row in held_out}
    with pytest.raises(ValueError, match="train and eval"):
        rows_of(name, "test")
