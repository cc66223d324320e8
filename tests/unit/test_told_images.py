"""Images that tools and environments give: the tokens that stand for them, their limits, and that the model is as untouched."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from playing import call, play, turns
from seeing import picture, seeing_config, seeing_reader, seeing_tokenizer

from pgrpo.admission.compare import difference, gradients, reference_logprobs
from pgrpo.admission.proof import True64, default_dtype, twins
from pgrpo.config import ConfigError
from pgrpo.config.task import ImageConfig
from pgrpo.environments.calls import CallFailed
from pgrpo.environments.chat import Chat
from pgrpo.environments.content import content_of, file_of
from pgrpo.environments.shown import ImagesRefused
from pgrpo.environments.transitions import check_transitions
from pgrpo.model.families.vision import Vision
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.rollout.vllm.images import EngineImages, as_prompt
from pgrpo.types import Episode, Sample
from pgrpo.vision.rows import next_position

SEES = seeing_tokenizer()
PAD: Any = SEES.convert_tokens_to_ids("<|image_pad|>")
LOOK = f"{call('look', which=1)}<|im_end|>"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return seeing_reader(tmp_path_factory.mktemp("processor"), SEES, seeing_config(SEES))


def look(which: int) -> Any:
    """Look at a picture.

    Args:
        which: Its number.
    """
    return [{"type": "text", "text": f"no {which}: "}, {"type": "image", "image": picture(64, 32, which)}]


class Camera:
    """Shows a picture at the beginning, and another when it is asked."""

    def reset(self, **row) -> Any:
        return [{"type": "text", "text": " see "}, {"type": "image", "image": picture(32, 32, 7)}]

    def look(self, which: int) -> Any:
        """Look.

        Args:
            which: Its number.
        """
        return picture(64, 32, which)


class Shows:
    """Leads, and shows pictures as the user."""

    async def converse(self, conversation) -> None:
        first = await conversation.generate()
        conversation.say({"role": "user", "content": ["and ", picture(32, 64, 3), "?"]})
        other = await conversation.fork()
        await conversation.generate()
        other.say({"role": "user", "content": picture(32, 32, 4)})
        await other.generate()
        self.first, self.heard = first.content, conversation.messages


def image(count: int) -> str:
    return f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"


def tokens(text: str) -> list[int]:
    return SEES(text, add_special_tokens=False)["input_ids"]


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def told(text: str) -> str:
    return f"\n<|im_start|>user\n<tool_response>{text}</tool_response><|im_end|>\n<|im_start|>assistant\n"


TOOLS = "<|im_start|>system\ntools: look <|im_end|>\n"


def by_hand(*parts: tuple[bool, str]) -> tuple[list[int], list[bool]]:
    """Tokens and mask of texts; whether each was sampled."""
    ids, mask = [], []
    for sampled, text in parts:
        own = tokens(text)
        ids += own
        mask += [sampled] * len(own)
    return ids, mask


def shown(sample: Sample) -> list[tuple[str, tuple[tuple[int, int], ...], tuple[int, int]]]:
    """Of each image: whether it is the data's, its tokens, its size."""
    return [("told" if x.content else "data", x.runs, x.size or (0, 0)) for x in sample.images.images]  # pyright: ignore


def test_an_image_is_told_as_the_template_writes_it(reader):
    """Tokens of the whole conversation, built by hand: those of two images are in it, expanded, with mask 0."""
    script = turns(LOOK, LOOK.replace("1", "2"), "done<|im_end|>")
    ((episode,),), engine = play(script, tools=[look], tokenizer=SEES, reader=reader, max_images=2)
    (sample,) = episode.samples
    ids, mask = by_hand(
        (True, LOOK), (False, told(f"no 1: {image(8)}")), (True, LOOK.replace("1", "2")),
        (False, told(f"no 2: {image(8)}")), (True, "done<|im_end|>"),
    )  # fmt: skip
    assert (sample.prompt_ids, sample.token_ids, sample.mask) == (tokens(TOOLS + user("go")), ids, mask)
    whole = sample.prompt_ids + ids
    starts = [i for i, token in enumerate(whole) if token == PAD and whole[i - 1] != PAD]
    assert shown(sample) == [("told", ((start, start + 8),), (64, 32)) for start in starts]
    assert len({x.key for x in sample.images.images}) == 2 and episode.finish_reason == "stop"  # pyright: ignore
    assert sample.rollout_logprobs == [-0.5 if sampled else 0.0 for sampled in mask]
    second, third = engine.requests[1:]
    assert second.images and [x.key for x in second.images.images] == [sample.images.images[0].key]  # pyright: ignore
    assert third.images and third.images.unexpanded_ids == tokens(
        TOOLS + user("go") + LOOK + told(f"no 1: {image(1)}") + LOOK.replace("1", "2") + told(f"no 2: {image(1)}")
    )
    assert third.continued == len(second.token_ids) + len(tokens(LOOK.replace("1", "2")))


def test_what_rewards_and_records_see_of_an_image(reader):
    script = turns(LOOK, "done<|im_end|>")
    ((episode,),), _ = play(script, tools=[look], tokenizer=SEES, reader=reader, max_images=1)
    said = episode.messages[1]
    assert said["role"] == "tool" and [part["type"] for part in said["content"]] == ["text", "image"]
    part = said["content"][1]
    assert part["size"] == (64, 32) and part["image"].startswith(b"\x89PNG")
    from pgrpo.tracking.record import shown as recorded
    from pgrpo.types import Prompt

    row = recorded(Prompt(0, "go", [1]), episode)
    assert "[tool look] no 1: [image 64x32]" in row["completion"]
    assert json.loads(json.dumps(row))["messages"][1]["content"] == "no 1: [image 64x32]"


def test_an_environment_shows_images_beside_those_of_the_data(reader):
    """In front of all is the row's, then what ``reset`` said, then the tool's; each is numbered where it is."""
    rows = ({"images": [picture(64, 64, 9)]},)
    script = turns(LOOK, "done<|im_end|>")
    ((episode,),), engine = play(
        script, environment=Camera, tokenizer=SEES, reader=reader, max_images=2, rows=rows, prompt=200
    )
    (sample,) = episode.samples
    prompt = TOOLS + user(f"{image(16)}go see {image(4)}")
    ids, mask = by_hand((True, LOOK), (False, told(image(8))), (True, "done<|im_end|>"))
    assert (sample.prompt_ids, sample.token_ids, sample.mask) == (tokens(prompt), ids, mask)
    assert [kind for kind, _, _ in shown(sample)] == ["data", "told", "told"]
    assert [size for _, _, size in shown(sample)] == [(64, 64), (32, 32), (64, 32)]
    assert episode.prompt and episode.prompt.messages == [{"role": "user", "content": "<image>go see <image>"}]
    assert episode.prompt.text == TOOLS + user(f"{image(1)}go see {image(1)}")
    unexpanded = tokens(TOOLS + user(f"{image(1)}go see {image(1)}") + LOOK + told(image(1)))
    assert engine.requests[1].images and engine.requests[1].images.unexpanded_ids == unexpanded


def test_a_led_conversation_shows_images_in_its_branches(reader):
    script = turns("one<|im_end|>", "two<|im_end|>")
    ((episode,),), _ = play(script, environment=Shows, tokenizer=SEES, reader=reader, max_images=2)
    first, second = episode.samples
    asked = f"one<|im_end|>\n<|im_start|>user\nand {image(8)}?<|im_end|>\n"
    answer = "<|im_start|>assistant\n"
    assert first.token_ids == tokens(f"{asked}{answer}two<|im_end|>")
    assert second.token_ids == tokens(f"{asked}<|im_start|>user\n{image(4)}<|im_end|>\n{answer}two<|im_end|>")
    assert [size for _, _, size in shown(first)] == [(32, 64)]
    assert [size for _, _, size in shown(second)] == [(32, 64), (32, 32)]
    assert second.mask.count(True) == len(tokens("two<|im_end|>"))  # what both begin with is trained on once


def test_a_branch_behind_an_image_has_it(reader):
    """And counts positions on behind it, which an image of 2 x 4 rows moves by 4."""

    class Branches:
        async def converse(self, conversation) -> None:
            await conversation.generate()
            conversation.say({"role": "user", "content": picture(64, 32, 3)})
            await conversation.generate()
            other = await conversation.fork()
            other.say("more")
            await other.generate()

    script = turns("one<|im_end|>", "two<|im_end|>", "three<|im_end|>")
    ((episode,),), engine = play(script, environment=Branches, tokenizer=SEES, reader=reader, max_images=1)
    first, second = episode.samples
    assert first.images and second.images and first.images.images == second.images.images
    request = engine.requests[-1]
    assert request.images and request.images.images == first.images.images
    assert next_position(request.token_ids, request.images) == len(request.token_ids) - 8 + 4


def test_a_history_that_is_written_anew_has_its_images(reader):
    """A template that leaves out earlier calls: another sample, whose first image is at another place."""
    rewriting = seeing_tokenizer()
    calls = "message.tool_calls or []"
    rewriting.chat_template = rewriting.chat_template.replace(calls, f"({calls} if loop.last else [])")
    ((episode,),), engine = play(
        turns(LOOK, LOOK, "done<|im_end|>"),
        tools=[look],
        tokenizer=rewriting,
        reader=reader,
        max_images=2,
        history="fork",
    )
    assert len(episode.samples) == 3 and episode.counts["rewritten"] == 2
    for sample, request in zip(episode.samples, engine.requests, strict=True):
        whole = sample.prompt_ids + sample.token_ids
        runs = [x.runs[0] for x in sample.images.images] if sample.images else []
        assert sum(end - start for start, end in runs) == whole.count(PAD)
        assert all(whole[start:end] == [PAD] * 8 and whole[start - 1] != PAD for start, end in runs)
        assert request.continued == 0
        assert (request.images is None) == (not runs)
    assert [len(s.images.images) if s.images else 0 for s in episode.samples] == [0, 1, 2]


def episodes_of(reader) -> list[Episode]:
    """Tool images, images of the data and of ``reset``, two with the same tokens but another image, branches."""
    rows = ({"images": [picture(64, 64, 9)]}, {"images": [picture(64, 64, 8)]}, {})

    def script(text: str) -> str:
        told = text.count("<tool_response>")
        return LOOK.replace("1", str(1 + told)) if told < 2 else "done<|im_end|>"

    found, _ = play(
        script, environment=Camera, tokenizer=SEES, reader=reader, max_images=9, rows=rows, size=2, prompt=200
    )
    led, _ = play(
        turns("one<|im_end|>", "two<|im_end|>"), environment=Shows, tokenizer=SEES, reader=reader, max_images=9
    )
    return [episode for group in [*found, *led] for episode in group]


@pytest.fixture(scope="module")
def models():
    config = seeing_config(SEES)
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float64):
        return twins(config, 0)


def compared(models, reader, samples, break_batch=lambda batch: batch):
    untouched, grouped = models
    policy, seen = Policy(grouped), Vision.of(untouched)
    assert policy.vision is not None and seen is not None
    policy.vision.pixels = seen.pixels = reader.pixels
    batch = break_batch(build_batch(Forest.of(samples)))
    with True64():
        wanted = reference_logprobs(untouched, samples, more=seen.reference_inputs)
        return difference(policy, batch, wanted, gradients(wanted, untouched)), batch


def test_an_episode_with_told_images_is_exact(models, reader):
    """Float64 against the untouched model on whole conversations, one sample a call: log-probs, and gradients of all, the tower's
    too. Rows are shared up to the first image that differs."""
    samples = [sample for episode in episodes_of(reader) for sample in episode.samples]
    found, batch = compared(models, reader, samples)
    assert found.logprob < 1e-12 and found.gradient < 1e-12
    assert batch.images is not None and len(batch.images.keys) == 7 and len(batch.images.contents) == 5
    assert batch.packed_tokens < 0.7 * sum(len(s.prompt_ids + s.token_ids) for s in samples)


def test_told_images_in_the_wrong_order_or_place_are_seen(models, reader):
    """Bugs that the comparison above must notice."""
    samples = [sample for episode in episodes_of(reader)[:2] for sample in episode.samples]

    def exchanged(batch):
        keys = list(batch.images.keys)
        at = [i for i, key in enumerate(keys) if batch.images.counts[i] == 8]
        keys[at[0]], keys[at[1]] = keys[at[1]], keys[at[0]]
        batch.images.keys[:] = keys
        return batch

    def as_text(batch):
        nodes = batch.layout.nodes
        rows = torch.cat([torch.arange(node.offset, node.offset + node.length) for node in nodes])
        batch.inputs["position_ids"] = rows.expand(3, -1)
        return batch

    for broken in (exchanged, as_text):
        found, _ = compared(models, reader, samples, broken)
        assert found.logprob > 1e-3


def test_equal_tokens_with_another_image_are_not_merged(reader):
    """The two first rows have images of one size, so their ids are equal."""
    episodes = episodes_of(reader)
    a, b = episodes[0].samples[0], episodes[2].samples[0]
    assert a.prompt_ids == b.prompt_ids and a.token_ids == b.token_ids and a.images != b.images
    start = a.images.images[0].runs[0][0]  # pyright: ignore[reportOptionalMemberAccess]
    assert Forest.of([a, b]).rows == 2 * len(a.prompt_ids + a.token_ids) - start
    assert Forest.of([a, episodes[1].samples[0]]).rows == len(a.prompt_ids + a.token_ids)


# ---- limits ----


def blind(which: int) -> Any:
    """Look at a picture.

    Args:
        which: Its number.
    """
    return picture(64, 32, which)


@pytest.mark.parametrize(
    ("most", "said"),
    [(1, "this episode was given 1 images, and 1 more would be above environment.max_images=1"), (2, None)],
)
def test_more_images_than_an_episode_may_be_given_are_failures_of_their_calls(reader, most, said):
    script = turns(LOOK, LOOK, "done<|im_end|>")
    ((episode,),), _ = play(script, tools=[look], tokenizer=SEES, reader=reader, max_images=most)
    assert episode.counts["failures"] == (said is not None)
    assert (said or "no 1: ") in str(episode.messages[3]["content"])
    assert episode.finish_reason == "stop"


@pytest.mark.parametrize("where", ["tool", "reset", "say"])
def test_a_run_that_is_not_made_for_images_stops_at_the_first(reader, where):
    given: dict[str, Any] = {"tool": {"tools": [look]}, "reset": {"environment": Camera}, "say": {"environment": Shows}}
    with pytest.raises(ImagesRefused, match=r"environment\.max_images=0 does not allow: set it to the most images"):
        play(
            turns(LOOK if where == "tool" else "one<|im_end|>", "done<|im_end|>"),
            tokenizer=SEES,
            reader=reader,
            **given[where],
        )


def stare(which: int) -> Any:
    """Look at a large picture.

    Args:
        which: Its number.
    """
    return ["no 1: ", picture(128, 128, which)]


def test_what_does_not_fit_is_left_out_with_a_note(reader):
    """Half of what an episode has left is for what the model is told. With a token less than text and image need, the image is left
    out; with hardly any the text is cut too; or the episode ends, where that is chosen."""
    stared = LOOK.replace("look", "stare")

    def longest(room: int, **settings: Any) -> Episode:
        script = turns(stared, "done<|im_end|>")
        kwargs = {"tools": [stare], "tokenizer": SEES, "reader": reader, "max_images": 1, "turn": 99} | settings
        return play(script, episode=len(tokens(stared)) + room, **kwargs)[0][0][0]

    said = len(tokens(told(f"no 1: {image(64)}")))
    whole = longest(2 * said)
    assert whole.counts["cut_results"] == 0 and whole.samples[0].token_ids.count(PAD) == 64
    left_out = longest(2 * said - 2)
    assert left_out.messages[1]["content"] == "no 1: [image 128x128 does not fit and is left out]"
    assert left_out.counts["cut_results"] == 1 and left_out.samples[0].images is None
    assert PAD not in left_out.samples[0].token_ids and left_out.finish_reason == "stop"
    ended = longest(said, overlong="end")
    assert ended.finish_reason == "length" and ended.samples[0].images is None


@pytest.mark.parametrize("count", [4, 8, 12, 16])
def test_as_many_images_as_do_not_fit_are_left_out_at_once(reader, count):
    """The most that fit are shown, whatever the count is, with one note for the others."""

    def look(which: int) -> Any:
        """Look.

        Args:
            which: Its number.
        """
        return [picture(128, 128, i) for i in range(count)]

    def length(shown: int) -> int:
        note = f"[{count - shown} images do not fit and are left out]" if shown < count else ""
        return len(tokens(told(image(64) * shown + note)))

    room = length(2) if count == 4 else length(3)
    script = turns(LOOK, "done<|im_end|>")
    more: dict[str, Any] = {"tools": [look], "tokenizer": SEES, "reader": reader, "max_images": 16, "turn": 400}
    ((episode,),), _ = play(script, episode=len(tokens(LOOK)) + 2 * room, **more)
    fitting = max(shown for shown in range(count) if length(shown) <= room)
    assert (episode.finish_reason, episode.counts["cut_results"]) == ("stop", 1)
    assert episode.samples[0].token_ids.count(PAD) == 64 * fitting
    *images, note = episode.messages[1]["content"]
    number = count - fitting
    assert len(images) == fitting
    assert note["text"] == (
        f"[{number} images do not fit and are left out]"
        if number > 1
        else "[image 128x128 does not fit and is left out]"
    )


@pytest.mark.parametrize(
    ("limits", "told_count", "said"),
    [
        (ImageConfig(max_pixels=32 * 32), 2, None),
        (ImageConfig(max_file_pixels=2000), None, "64 x 32 pixels are more than data.image.max_file_pixels=2000"),
        (ImageConfig(max_file_pixels=1000), None, "64 x 32 pixels are more than data.image.max_file_pixels=1000"),
    ],
)
def test_limits_of_pixels_hold_for_told_images(tmp_path, limits, told_count, said):
    reader = seeing_reader(tmp_path, SEES, seeing_config(SEES), limits)
    script = turns(LOOK, "done<|im_end|>")
    ((episode,),), _ = play(script, tools=[look], tokenizer=SEES, reader=reader, max_images=1)
    if said:
        assert said in episode.messages[1]["content"] and episode.counts["failures"] == 1
    else:
        assert episode.samples[0].token_ids.count(PAD) == told_count


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no image", "this is no image that Pillow reads"),
        (picture(1, 9), "an image has at least two each way"),
        ("https://a.b/c.png", "an image is not read from 'https://a.b/c.png'; return it as a PIL image"),
        ("/etc/passwd", "an image is not read from '/etc/passwd'"),
        (None, "a block of type 'image' has no image"),
        (3, "an image is a PIL image or the bytes of a file, not int"),
    ],
)
def test_what_is_no_image_is_a_failure_that_the_model_is_told(reader, content, said):
    def look(which: int) -> Any:
        """Look.

        Args:
            which: Its number.
        """
        return [{"type": "image", "image": content}]

    ((episode,),), _ = play(turns(LOOK, "done<|im_end|>"), tools=[look], tokenizer=SEES, reader=reader, max_images=1)
    assert said in json.loads(episode.messages[1]["content"])["error"]
    assert episode.counts["look/failures"] == 1 and episode.finish_reason == "stop"


# ---- contents ----


def test_what_is_returned_becomes_texts_and_images():
    red = picture(8, 4)
    data = base64.b64encode(b"file").decode()
    found = content_of(["a", {"type": "text", "text": "b\ud800"}, red, {"type": "image", "image": b"file"}, "c"])
    assert [part.get("text") for part in found] == ["ab?", None, None, "c"]  # pyright: ignore
    first = file_of(found[1])  # pyright: ignore[reportArgumentType]
    from PIL import Image as pillow

    assert np.array_equal(np.array(pillow.open(io.BytesIO(first))), np.array(red))
    assert found[2] == {"type": "image", "base64": data}
    assert content_of(json.loads(json.dumps(found))) == found
    for block in (
        {"type": "image", "base64": data}, {"type": "image", "data": data, "mimeType": "image/png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}, {"type": "image", "bytes": b"file"},
    ):  # fmt: skip
        assert content_of([block]) == [{"type": "image", "base64": data}]
    assert content_of(red.convert("CMYK"))[0]["type"] == "image"  # pyright: ignore
    for value, text in (
        (None, "None"),
        (["a", "b"], "['a', 'b']"),
        ({"type": "circle"}, "{'type': 'circle'}"),
        ([], "[]"),
    ):
        assert content_of(value) == text
    assert content_of([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == "ab"
    for wrong in ([{"type": "audio"}], [red.convert("F")], [{"type": "image", "base64": "?"}]):
        with pytest.raises(CallFailed):
            content_of(wrong)


def test_the_start_tries_an_image_in_what_is_told(reader):
    """Each template is tried once with an image in a result and in what a user says."""
    end = SEES.convert_tokens_to_ids("<|im_end|>")
    schema = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

    def tried(template: str, **more: Any):
        tokenizer = seeing_tokenizer()
        tokenizer.chat_template = template
        return check_transitions(Chat(tokenizer, [end], [schema], {}, reader), "tools", with_images=True, **more)

    good = str(SEES.chat_template)
    found = {one.name: one for one in tried(good)}
    for name in ("a call and its result with an image", "an answer and a user message with an image"):
        assert found[name].problem is None
    as_python = good.replace(
        "'\n<tool_response>' + show(message.content)", "'\n<tool_response>' + message.content|string"
    )
    assert as_python != good
    with pytest.raises(ConfigError, match=r"a call and its result with an image: .*or environment\.max_images=0"):
        tried(as_python)
    twice = good.replace("<|image_pad|>", "<|image_pad|><|image_pad|>")
    with pytest.raises(ConfigError, match=r"it writes 2 placeholders \(<\|image_pad\|>\) for 1 images"):
        tried(twice)
    assert not [
        one for one in check_transitions(Chat(SEES, [end], [schema], {}, reader), "tools") if "image" in one.name
    ]


def test_vllm_is_given_the_files_of_told_images(reader):
    script = turns(LOOK, "done<|im_end|>")
    _, engine = play(
        script, tools=[look], tokenizer=SEES, reader=reader, max_images=1, rows=({"images": [picture(64, 64, 9)]},)
    )
    request = engine.requests[1]
    given = as_prompt(request, EngineImages(reader.picture, 2))
    assert given["prompt_token_ids"].count(PAD) == 2 and len(given["multi_modal_uuids"]["image"]) == 2
    assert [x.size for x in given["multi_modal_data"]["image"]] == [(64, 64), (64, 32)]
    assert np.array_equal(np.array(given["multi_modal_data"]["image"][1]), np.array(picture(64, 32, 1)))
