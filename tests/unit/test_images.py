"""Images of rows: what is read and what is refused, where they stand in prompts, and the tokens that stand for them."""

from __future__ import annotations

import io
import logging
import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as Images
from PIL import Image
from transformers import AutoConfig

from pgrpo.config import ConfigError, DataConfig, MessageConfig, ModelConfig, PromptConfig
from pgrpo.config.task import ImageConfig
from pgrpo.data import PromptStream, load_prompts
from pgrpo.data.sources import read_rows
from pgrpo.vision import files
from pgrpo.vision.files import find, open_image
from pgrpo.vision.reader import ImageReader

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "make_tiny_vision_model.py"))
PAD = SCRIPT["VOCABULARY"].index("<|image_pad|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The config, tokenizer and image processor of a tiny Qwen3-VL, and two pictures."""
    tmp = tmp_path_factory.mktemp("tiny_vision")
    SCRIPT["make_config"]().save_pretrained(tmp)
    SCRIPT["make_tokenizer"]().save_pretrained(tmp)
    SCRIPT["make_processor"]().save_pretrained(tmp)
    picture("red").save(tmp / "red.png")
    picture("blue", (64, 32)).save(tmp / "blue.png")
    return tmp


def picture(colour="red", size=(64, 64), mode="RGB"):
    return Image.new("RGB", size, colour).convert(mode)


def reader_of(folder: Path, **limits) -> ImageReader:
    return ImageReader(
        ModelConfig(path=str(folder)), AutoConfig.from_pretrained(folder), SCRIPT["make_tokenizer"](), ImageConfig(**limits)
    )  # fmt: skip


CHAT = PromptConfig(messages=[MessageConfig("user", "{question}")], images_column="images")


def load(folder: Path, rows, prompt=CHAT, reader=None, **data):
    return load_prompts(
        DataConfig(path=str(folder / "rows.jsonl"), **data), prompt, SCRIPT["make_tokenizer"](), dataset=rows,
        reader=reader or reader_of(folder),
    ).prompts  # fmt: skip


def png(image) -> bytes:
    image.save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def test_an_image_is_the_same_however_a_row_has_it(folder, monkeypatch):
    """A path, bytes and a dict of ``datasets``; and a PIL image has the same pixels. The prompt has both forms of ids."""
    monkeypatch.chdir(folder)
    content = (folder / "red.png").read_bytes()
    forms = [
        "red.png",
        folder / "red.png",
        content,
        {"bytes": content, "path": None},
        {"bytes": None, "path": "red.png"},
    ]
    reader = reader_of(folder)
    rows = [{"images": form, "question": "which colour?"} for form in [*forms, [forms[0]], picture()]]
    *prompts, of_pil = load(folder, rows, reader=reader)
    for prompt in prompts:
        assert prompt.token_ids == prompts[0].token_ids
        assert prompt.images is not None and prompts[0].images is not None
        assert replace(prompt.images, where=prompts[0].images.where) == prompts[0].images
    first = prompts[0]
    assert first.images is not None
    assert of_pil.images is not None
    assert first.token_ids.count(PAD) == 16
    assert first.images.unexpanded_ids.count(PAD) == 1
    start = first.token_ids.index(PAD)
    assert first.images.images[0].runs == ((start, start + 16),)
    assert first.text.count("<|image_pad|>") == 1
    assert first.images.positions is not None
    assert len(first.images.positions[0]) == len(first.token_ids)
    a, b = (reader.pixels(images.images[0].key)["pixel_values"] for images in (first.images, of_pil.images))
    assert torch.equal(a, b)


def test_images_stand_where_marks_are(folder, caplog):
    """Two images in a text, three in front of one without marks, and image parts of a conversation, with their image or without."""
    red, blue = str(folder / "red.png"), str(folder / "blue.png")
    reader = reader_of(folder)

    def loaded(row, prompt=CHAT):
        return load(folder, [row], prompt, reader)[0]

    marked = loaded({"images": [red, blue], "question": "a <image> or <image> ?"})
    at = "<|vision_start|><|image_pad|><|vision_end|>"
    assert marked.text == f"a {at} or {at} ?:"
    assert marked.images is not None
    assert [end - start for image in marked.images.images for start, end in image.runs] == [16, 8]
    assert marked.messages == [{"role": "user", "content": "a <image> or <image> ?"}]
    assert loaded({"images": [red, blue, red], "question": "a"}).text == f"{at * 3}a:"
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "1"}]
    column = PromptConfig(messages_column="chat", images_column="images")
    of_column = loaded({"chat": [{"role": "user", "content": parts}], "images": [blue]}, column)
    parts = [parts[0], {"type": "image", "image": blue}, parts[2]]
    own = loaded({"chat": [{"role": "user", "content": parts}]}, PromptConfig(messages_column="chat"))
    assert own.text == of_column.text == f"a{at}1:"
    assert own.images == of_column.images
    text_only = loaded({"images": None, "question": "a"})
    assert text_only.images is None
    assert PAD not in text_only.token_ids
    assert [r.getMessage() for r in caplog.records] == ["1 of 1 rows have no image in column `images`"]
    raw = loaded({"images": red, "question": "a"}, PromptConfig(template="<image>{question}", images_column="images"))
    assert raw.token_ids.count(PAD) == 16


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"images": ["red.png"], "question": "<image> <image>"}, "row 0: 2 <image> marks in its messages, and 1 images"),
        ({"images": None, "question": "<image>"}, "row 0: 1 <image> marks in its messages, and 0 images"),
        ({"images": "green.png", "question": "a"}, "row 0, column `images`: no file green.png"),
        ({"images": 3, "question": "a"}, "row 0, column `images`: an image is a path, a URL, bytes or a PIL image, not 3"),
        ({"images": {"height": 3}, "question": "a"}, "not a dict of height"),
        ({"images": "http://example.com/a.png", "question": "a"}, "add its host to data.image.allowed_hosts (example.com)"),
    ],
)  # fmt: skip
def test_a_row_that_has_no_such_images_is_named(folder, monkeypatch, row, said):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(folder, [row])


def test_a_placeholder_in_a_rows_text_is_text(folder):
    prompt = load(folder, [{"images": str(folder / "red.png"), "question": "a <|image_pad|>"}])[0]
    assert prompt.token_ids.count(PAD) == 16
    assert "<unk>" in SCRIPT["make_tokenizer"]().decode(prompt.token_ids)


def test_a_file_that_changed_is_noticed_when_a_run_resumes(folder, tmp_path):
    rows = [{"images": str(tmp_path / "a.png"), "question": "a"}]
    states = []
    for colour in ("red", "red", "blue"):
        picture(colour).save(tmp_path / "a.png")
        states.append(PromptStream(load(folder, rows), seed=0, shuffle=False).state_dict())
    assert states[0] == states[1]
    assert states[0]["rows"] != states[2]["rows"]


def test_the_limit_of_tokens_counts_those_of_images(folder):
    rows = [{"images": str(folder / "red.png"), "question": "a"}]
    length = len(load(folder, rows)[0].token_ids)
    assert len(load(folder, rows, max_prompt_tokens=length)) == 1
    with pytest.raises(ConfigError, match=f"the prompt has {length} tokens"):
        load(folder, rows, max_prompt_tokens=length - 1)
    with pytest.raises(ConfigError, match=r"row 0 of dataset has images, which cannot be cut .* data.overlong=drop"):
        load(folder, rows, max_prompt_tokens=length - 1, overlong="truncate")
    small = load(folder, rows, reader=reader_of(folder, max_pixels=32 * 32), max_prompt_tokens=length - 12)[0]
    assert small.token_ids.count(PAD) == 4
    large = load(folder, rows, reader=reader_of(folder, min_pixels=96 * 96))[0]
    assert large.token_ids.count(PAD) == 36


def broken() -> bytes:
    return png(picture("red", (64, 64)))[:-60]


def animated() -> bytes:
    frames = [picture(colour) for colour in ("red", "blue")]
    frames[0].save(content := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:])
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (broken(), "it cannot be read: "),
        (b"not an image", "this is no image that Pillow reads"),
        (b"", "this is no image that Pillow reads"),
        (png(picture(size=(1, 1))), "1 x 1 pixels: an image has at least two each way"),
        (png(picture(size=(900, 2))), "the model's image processor refuses it: absolute aspect ratio"),
        (animated(), r"it is animated \(2 frames\)"),
        (png(picture(size=(300, 300))), r"300 x 300 pixels are more than data.image.max_file_pixels=40000"),
    ],
)
def test_a_bad_file_is_one_line_with_row_and_file(folder, tmp_path, content, said):
    (tmp_path / "bad.png").write_bytes(content)
    rows = [
        {"images": str(folder / "red.png"), "question": "a"},
        {"images": str(tmp_path / "bad.png"), "question": "a"},
    ]
    with pytest.raises(ConfigError, match=f"^row 1, column `images`, .*bad.png: {said}") as error:
        load(folder, rows, reader=reader_of(folder, max_file_pixels=40_000))
    assert "\n" not in str(error.value)


def test_a_file_that_the_processor_refuses_later_is_named_too(folder, tmp_path):
    picture("red").save(tmp_path / "a.png")
    reader = reader_of(folder)
    (prompt,) = load(folder, [{"images": str(tmp_path / "a.png"), "question": "a"}], reader=reader)
    assert prompt.images is not None
    picture("red", (900, 2)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"^row 0, column `images`, .*a\.png: the model's image processor refuses it"):
        reader.pixels(prompt.images.images[0].key)


@pytest.mark.parametrize("side", [8_000, 20_000])
def test_size_is_checked_before_an_image_is_decoded(monkeypatch, side):
    """And Pillow's own limit on bombs is answered in our words."""
    source = find(png_of_size(side, side), "here", ImageConfig(), Path())
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ConfigError, match=r"here, bytes: .*more.* data.image.max_file_pixels=50000000"):
        open_image(source, "here", ImageConfig())


def test_pillows_own_limit_is_named_where_ours_is_higher():
    source = find(png_of_size(20_000, 20_000), "here", ImageConfig(), Path())
    with pytest.raises(
        ConfigError, match=r"^here, bytes: it has more pixels than the 178,956,970 that Pillow reads; make"
    ):
        open_image(source, "here", ImageConfig(max_file_pixels=2**30))


def test_a_photograph_with_a_gain_map_is_one_image():
    """Phones write such files (MPO), whose second image is not another frame."""
    picture("red").save(content := io.BytesIO(), "MPO", save_all=True, append_images=[picture("blue", (16, 16))])
    image = open_image(find(content.getvalue(), "", ImageConfig(), Path()), "", ImageConfig())
    red, green, blue = image.getpixel((30, 30))  # pyright: ignore[reportGeneralTypeIssues]
    assert image.size == (64, 64) and red > 240 and green + blue < 20


@pytest.mark.parametrize("error", [RuntimeError("Failed to decode\nimage"), KeyError(7), MemoryError()])
def test_whatever_pillow_raises_of_a_broken_file_is_one_line(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(ConfigError, match=r"^row 2, bytes: it cannot be read: (Failed to decode image|7|MemoryError)$"):
        open_image(find(png(Image.new("L", (4, 4))), "row 2", ImageConfig(), Path()), "row 2", ImageConfig())


def png_of_size(width: int, height: int) -> bytes:
    """A small picture whose header says that it is a large one."""
    import zlib

    content = bytearray(png_small := png(Image.new("L", (2, 2))))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
    assert len(content) == len(png_small)
    return bytes(content)


def test_palettes_are_part_of_an_image_and_its_bits_are_not_clipped():
    red, blue = (find(picture(colour).quantize(), "", ImageConfig(), Path()) for colour in ("red", "blue"))
    assert red.key != blue.key
    grey = open_image(find(png(Image.new("I;16", (4, 4), 30000)), "", ImageConfig(), Path()), "", ImageConfig())
    assert grey.getpixel((0, 0)) == (117, 117, 117)
    with pytest.raises(ConfigError, match=r"here: 'data:image/png.* cannot be read: File name too long; give"):
        find("data:image/png;base64," + "A" * 5000, "here", ImageConfig(), Path())


def test_black_and_transparent_images_are_taken(folder, caplog):
    """A black one with a warning; what is transparent lies on white; grey, palette and 16-bit images become RGB."""
    limits = ImageConfig()
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert open_image(find(png(clear), "", limits, Path()), "", limits).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("L", "P", "1", "RGBA", "CMYK"):
        image = open_image(find(picture("white", mode=mode), "", limits, Path()), "", limits)
        assert (image.mode, image.getpixel((3, 3))) == ("RGB", (255, 255, 255)), mode
    with caplog.at_level(logging.WARNING, logger="pgrpo"):
        assert load(folder, [{"images": picture("black"), "question": "a"}])
    assert [r.getMessage() for r in caplog.records] == ["row 0, column `images`, a RGB image: the image is all black"]


def test_urls_are_read_from_allowed_hosts_alone(monkeypatch):
    """Redirects are followed to such hosts only."""
    import httpx

    moved = {
        "http://a.org/1": "http://b.org/2",
        "http://a.org/3": "/4",
        "http://a.org/5": "http://a.org/5",
        "http://b.org/6": "file:///etc/passwd",
    }

    def answer(request: httpx.Request) -> httpx.Response:
        if to := moved.get(str(request.url)):
            return httpx.Response(302, headers={"location": to})
        return httpx.Response(404 if "missing" in str(request.url) else 200, content=b"x" * 100)

    client = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(httpx, "stream", lambda *args, timeout, **kwargs: client.stream(*args, **kwargs))
    limits = ImageConfig(allowed_hosts=["a.org"])
    assert find("http://a.org/2", "here", limits, Path()).content == b"x" * 100
    assert find("http://a.org/3", "here", limits, Path()).content == b"x" * 100
    for url, said in {
        "http://a.org/1": r"http://b.org/2 is not read: add its host to data.image.allowed_hosts \(b.org\)",
        "http://b.org/2": r"add its host .* \(b.org\)",
        "http://a.org/5": "redirects more than 3 times",
        "http://a.org/missing": "cannot be read: .*404",
    }.items():
        with pytest.raises(ConfigError, match=f"^here: .*{said}"):
            find(url, "here", limits, Path())
    with pytest.raises(ConfigError, match="file:///etc/passwd is not read"):
        find("http://b.org/6", "here", ImageConfig(allowed_hosts=["b.org", ""]), Path())
    with pytest.raises(ConfigError, match="more than 40 bytes"):
        find("http://a.org/2", "here", ImageConfig(allowed_hosts=["a.org"], max_file_pixels=10), Path())
    assert files.MOST_REDIRECTS == 3


def test_images_of_a_hub_data_set_are_not_decoded_before_their_size_is_checked(folder, tmp_path, monkeypatch):
    """In a column of images, in lists, and within other columns. One is small as a file and has 400 million pixels."""
    huge = {"bytes": png(Image.new("1", (20_000, 20_000))), "path": "huge.png"}
    rows = [
        {
            "images": [picture("red")],
            "image": picture("blue"),
            "more": {"of": [picture()]},
            "question": "which colour?",
        },
        {"images": [huge], "image": None, "more": None, "question": "?"},
    ]
    kinds = {"images": List(Images()), "image": Images(), "more": {"of": List(Images())}, "question": Value("string")}
    Dataset.from_list(rows, features=Features(kinds)).to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    monkeypatch.setattr(Images, "decode_example", lambda *_, **__: pytest.fail("decoded"))
    read, _ = read_rows(DataConfig(path=str(tmp_path / "hub")), held_out=False)
    assert [row["question"] for row in read] == ["which colour?", "?"]
    found = [read[0]["images"][0], read[0]["image"], read[0]["more"]["of"][0]]
    assert [open_image(find(one, "", ImageConfig(), folder), "", ImageConfig()).getpixel((0, 0)) for one in found] == [
        (255, 0, 0), (0, 0, 255), (255, 0, 0)
    ]  # fmt: skip
    (prompt,) = load(folder, read[:1])
    assert prompt.token_ids.count(PAD) == 16
    with pytest.raises(
        ConfigError, match=r"^row 1, column `images`, huge.png: it has more pixels than data.image.max_file"
    ):
        load(folder, read)


def test_shapes_are_the_same_each_time_and_their_answers_right():
    """Counted by regions of the picture that are not ground: a shape is in a corner of its own."""
    recipe = runpy.run_path(str(ROOT / "recipes" / "shapes.py"))
    train, held_out = recipe["rows"]("train")[:60], recipe["rows"]("eval")
    assert [row["images"][0].tobytes() for row in train] == [
        row["images"][0].tobytes() for row in recipe["rows"]("train")[:60]
    ]
    assert not {row["images"][0].tobytes() for row in train} & {row["images"][0].tobytes() for row in held_out}
    assert {row["question"] for row in held_out} == {"how many shapes?", "which colour?", "which corner?"}
    for row in held_out:
        image, side = row["images"][0], recipe["CELL"]
        ground = max(image.getcolors())[1]
        seen = {}
        for corner, name in enumerate(recipe["CORNERS"]):
            x, y = corner % 2 * side, corner // 2 * side
            colours = {colour for _, colour in image.crop((x, y, x + side, y + side)).getcolors()} - {ground}
            if colours:
                (seen[name],) = colours
        (colour,) = {name for name, value in recipe["COLOURS"].items() if value in seen.values()}
        right = {"how many shapes?": str(len(seen)), "which colour?": colour, "which corner?": next(iter(seen))}
        assert row["answer"] == right[row["question"]]
