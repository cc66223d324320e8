"""What tools and environments may give as an image, in this process and in a worker: what is taken, and what fails a call."""

from __future__ import annotations

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as pillow
from playing import call, one, play, turns
from seeing import picture, seeing_config, seeing_reader, seeing_tokenizer

from pgrpo.config import Config
from pgrpo.config.task import EnvironmentConfig, ImageConfig
from pgrpo.environments import content
from pgrpo.environments.calls import CallFailed
from pgrpo.environments.content import content_of, file_of
from pgrpo.environments.long_form import Conversation
from pgrpo.environments.toolbox import load_toolbox
from pgrpo.vision.files import Source, open_image

SEES = seeing_tokenizer()
LOOK = f"{call('look', which=1)}<|im_end|>"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return seeing_reader(tmp_path_factory.mktemp("processor"), SEES, seeing_config(SEES))


def png(size: tuple[int, int] = (64, 32)) -> bytes:
    data = io.BytesIO()
    picture(*size).save(data, "PNG")
    return data.getvalue()


def closed() -> Any:
    image = pillow.open(io.BytesIO(png()))
    image.close()
    return image


class Unprintable:
    def __str__(self) -> str:
        raise KeyError("x")


BAD = {
    "closed": (closed, "it cannot be read: Operation on closed image"),
    "truncated": (lambda: pillow.open(io.BytesIO(png()[:3000])), "it cannot be read: image file is truncated"),
    "empty": (lambda: pillow.new("RGB", (0, 0)), "0 x 0 pixels: an image has at least two each way"),
    "base64": (lambda: [{"type": "image", "base64": "é"}], "an image's base64 cannot be read"),
    "unprintable": (Unprintable, "KeyError: 'x'"),
    "nested": (lambda: {"frame": [1, picture(4, 4)]}, "there is an image within a dict; return a PIL image"),
    "beside a number": (lambda: [3, {"type": "image", "data": b"file"}], "there is an image within a list"),
}


@pytest.mark.parametrize(("make", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_shown_fails_its_call_and_not_the_run(reader, make, said):
    def look(which: int) -> Any:
        """Look.

        Args:
            which: Its number.
        """
        return make()

    class Camera:
        def reset(self, **row) -> Any:
            return make()

        def look(self, which: int) -> Any:
            """Look.

            Args:
                which: Its number.
            """

    seen: dict[str, Any] = {"tokenizer": SEES, "reader": reader, "max_images": 1}
    episode = one(turns(LOOK, "done<|im_end|>"), tools=[look], **seen)
    assert said in json.loads(episode.messages[1]["content"])["error"]
    assert episode.counts["look/failures"] == 1 and episode.finish_reason == "stop"
    began = one(turns("done<|im_end|>"), environment=Camera, **seen)
    assert began.finish_reason == "environment" and began.messages[0]["content"].startswith("reset: ")


def test_an_image_that_a_call_takes_too_long_to_give_ends_the_episode(reader):
    class Slow:
        def __str__(self) -> str:
            threading.Event().wait(30)
            return ""

    def look(which: int) -> Any:
        """Look.

        Args:
            which: Its number.
        """
        return Slow()

    script = turns(LOOK, "done<|im_end|>")
    episode = one(script, tools=[look], tokenizer=SEES, reader=reader, max_images=1, call_timeout_s=0.3)
    assert episode.finish_reason == "timeout"


def test_one_image_may_be_given_to_many_episodes_at_once(reader, monkeypatch):
    """Its file is read at the first use, by one thread at a time."""
    inside, most = [0], [0]

    def opened(*args: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threading.Event().wait(0.01)
        image = open_image(*args)
        inside[0] -= 1
        return image

    monkeypatch.setattr(content, "open_image", opened)
    shared = pillow.open(io.BytesIO(png((320, 240))))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(content_of, [shared] * 8))
    assert most == [1] and all(one == found[0] for one in found)
    pixels = np.array(pillow.open(io.BytesIO(file_of(found[0][0]))))  # pyright: ignore
    assert np.array_equal(pixels, np.array(picture(320, 240)))


def modes() -> list[Any]:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 32, 4), dtype=np.uint8)
    base = pillow.fromarray(pixels, "RGBA")
    deep = pillow.fromarray((pixels[..., 0].astype(np.uint16)) << 8)
    spotted = base.convert("RGB").convert("P")
    spotted.info["transparency"] = 3
    return [
        *map(base.convert, ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV")),
        deep,
        spotted,
    ]


def test_an_image_is_seen_as_one_of_the_data():
    """In each mode, on white and upright as its EXIF data says: the pixels are those that ``open_image`` makes of it."""
    data, exif = io.BytesIO(), pillow.Exif()
    exif[0x112] = 6
    picture(64, 32).save(data, "JPEG", exif=exif)
    turned = pillow.open(data)
    for image in [*modes(), turned]:
        as_data = open_image(Source(image, "x", ""), "row 0", ImageConfig())
        told = open_image(Source(file_of(content_of(image)[0]), "x", ""), "told", ImageConfig())  # pyright: ignore
        assert told.size == as_data.size and told.tobytes() == as_data.tobytes(), image.mode
    assert told.size == (32, 64)


GIVEN = """
from PIL import Image

def look(which: int):
    '''Look.

    Args:
        which: Its number.
    '''
    image = Image.new("RGB", (64, 32), "red")
    return {
        1: ("no 1: ", image), 2: {"type": "image", "image": image}, 3: {"frame": image}, 4: Image.new("RGB", (300, 300)),
        5: ("a", 1), 6: {"type": "image", "size": 3}, 7: [image, 3],
    }[which]

class Returns:
    what = None

    def reset(self, **row):
        return self.what

    def look(self, which: int) -> str:
        '''Look.

        Args:
            which: Its number.
        '''
        return "x"

class Gym(Returns):
    what = ("you are in a room", {"seed": 7})

class Shown(Returns):
    what = [{"role": "user", "content": ("a", "b")}]

class Number(Returns):
    what = 3

class Sees(Returns):
    what = [{"role": "user", "content": ["a", Image.new("RGB", (64, 32))]}]
"""


def here_and_there(tmp_path: Path, name: str) -> list[Any]:
    """What a file has under a name: given from Python, and named."""
    path = tmp_path / "given.py"
    path.write_text(GIVEN)
    space: dict[str, Any] = {}
    exec(GIVEN, space)
    return [space[name], f"{path}:{name}"]


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (1, ["no 1: ", (64, 32)]),
        (2, [(64, 32)]),
        (3, "there is an image within a dict; return a PIL image, or a list of texts, images and blocks"),
        (4, "its result, an image: 300 x 300 pixels are more than data.image.max_file_pixels=80000"),
        (5, "('a', 1)"),
        (6, "{'type': 'image', 'size': 3}"),
        (7, "there is an image within a list"),
    ],
)
def test_what_a_tool_may_return_here_and_in_a_worker(tmp_path, which, said):
    reader = seeing_reader(tmp_path, SEES, seeing_config(SEES), ImageConfig(max_file_pixels=80_000))
    for tool in here_and_there(tmp_path, "look"):
        script = turns(LOOK.replace("1", str(which)), "done<|im_end|>")
        episode = one(script, tools=[tool], tokenizer=SEES, reader=reader, max_images=1)
        told = episode.messages[1]["content"]
        assert episode.finish_reason == "stop"
        if isinstance(said, str):
            assert said in told
        else:
            assert [part.get("text") or part["size"] for part in told] == said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "Gym",
            "it gave ('you are in a room', {'seed': 7}) (tuple); return a text, a list of messages or of blocks, or None",
        ),
        ("Shown", "the message {'role': 'user', 'content': ('a', 'b')} has no text as its `content`"),
        ("Number", "it gave 3 (int); return a text, a list of messages or of blocks, or None"),
        ("Sees", None),
    ],
)
def test_what_reset_may_return_here_and_in_a_worker(tmp_path, reader, name, said):
    for made in here_and_there(tmp_path, name):
        episode = one(turns("done<|im_end|>"), environment=made, tokenizer=SEES, reader=reader, max_images=1)
        if said is None:
            assert episode.finish_reason == "stop" and episode.prompt and episode.prompt.images
            assert episode.prompt.images.images[0].size == (64, 32)
        else:
            assert (episode.finish_reason, episode.messages[0]["content"]) == ("environment", f"reset: {said}")


def test_the_size_of_an_image_is_checked_before_it_is_decoded(monkeypatch):
    """In what a tool gives and in what an environment says."""
    image = pillow.open(io.BytesIO(png((300, 300))))
    monkeypatch.setattr(image, "load", lambda: pytest.fail("it was decoded"))
    limits, said = (
        ImageConfig(max_file_pixels=80_000),
        "300 x 300 pixels are more than data.image.max_file_pixels=80000",
    )
    with pytest.raises(CallFailed, match=said):
        content_of([{"type": "image", "image": image}], limits)

    async def ask(question: dict[str, Any]) -> dict[str, Any]:
        return {}

    with pytest.raises(ValueError, match=said):
        Conversation(ask, [], limits=limits).say({"role": "user", "content": image})


def test_workers_know_the_limit_of_the_config(tmp_path):
    here_and_there(tmp_path, "look")
    environment = EnvironmentConfig(max_images=1)
    config = Config(tools=[f"{tmp_path}/given.py:look"], environment=environment)
    config.data.image.max_file_pixels = 80_000
    toolbox = load_toolbox(config)
    assert toolbox.nursery
    worker = toolbox.nursery.worker()
    try:
        with pytest.raises(CallFailed, match=r"300 x 300 pixels are more than data\.image\.max_file_pixels=80000"):
            worker.ask("call", name=config.tools[0], arguments={"which": 4})
    finally:
        toolbox.nursery.close()


def test_files_of_many_bytes_are_refused(tmp_path):
    reader = seeing_reader(tmp_path, SEES, seeing_config(SEES), ImageConfig(max_file_pixels=1000))
    block = {"type": "image", "data": base64.b64encode(bytes(4001)).decode()}

    def look(which: int) -> Any:
        """Look.

        Args:
            which: Its number.
        """
        return block

    ((episode,),), _ = play(turns(LOOK, "done<|im_end|>"), tools=[look], tokenizer=SEES, reader=reader, max_images=1)
    assert "an image of 4001 bytes is too large; make it smaller" in episode.messages[1]["content"]
