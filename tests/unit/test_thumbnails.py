"""Small pictures of the images of logged completions: in the run folder, the report, wandb and, as text, on the console."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from making import episode, group
from PIL import Image as pillow
from rich.console import Console
from test_report import metrics, page_of, sample, write
from test_trackers import OnlineRun, make_config

from pgrpo.commands import report
from pgrpo.tracking import Trackers, thumbnails
from pgrpo.types import Group, Image, Prompt, PromptImages, Sample

KEYS = [f"{i:064x}" for i in range(3)]
COLOURS = {KEYS[0]: "red", KEYS[1]: "blue"}


class Drawn:
    """640 x 480 pixels of one colour by key; an image that a tool gave is in its content."""

    placeholder = "<|pad|>"

    def __init__(self) -> None:
        self.opened: list[str] = []

    def picture(self, key: str, content: bytes | None = None):
        self.opened.append(key)
        return pillow.open(io.BytesIO(content)) if content else pillow.new("RGB", (640, 480), COLOURS[key])


def file_of(size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    pillow.new("RGB", size, "green").save(data, "PNG")
    return data.getvalue()


def groups() -> list[Group]:
    """Two images in a prompt, and a third that a tool gave one of its episodes; and a prompt of text."""
    images = tuple(Image(key, ((1 + i, 2 + i),), (640, 480)) for i, key in enumerate(COLOURS))
    prompt = Prompt(0, "see <|pad|> and <|pad|>?", [1, 9, 9, 2], images=PromptImages(images, []))
    made = group(prompt, episode([3, 9, 4], 1.0), episode([3], 0.0))
    for one in made.episodes:
        one.samples[0].images = prompt.images
    told = Image(KEYS[2], ((5, 6),), (30, 300), file_of((30, 300)))
    made.episodes[0].samples[0].images = PromptImages((*images, told), [])
    return [made, group(Prompt(1, "text of <|pad|>", [1]), episode([3], 0.0))]


def logged(folder: Path, console: Console | None = None, pictures: Drawn | None = None, **track) -> list[dict]:
    folder.mkdir(exist_ok=True)
    trackers = Trackers(make_config(completions=9, **track), folder, console=console, pictures=pictures or Drawn())
    trackers.completions(1, groups())
    trackers.close()
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]


def test_each_image_of_a_logged_completion_is_one_small_file(tmp_path):
    pictures = Drawn()
    rows = logged(tmp_path, pictures=pictures)
    assert rows[0]["prompt"] == "see <|pad|> and <|pad|>?"  # as the model reads it
    assert rows[0]["images"] == rows[1]["images"] == [{"key": key, "size": [640, 480]} for key in KEYS[:2]]
    assert rows[0]["told_images"] == [{"key": KEYS[2], "size": [30, 300]}]
    assert "told_images" not in rows[1] and "images" not in rows[2]
    found = {path.stem: pillow.open(path) for path in tmp_path.glob("thumbnails/*")}
    assert {key: image.size for key, image in found.items()} == {
        KEYS[0]: (128, 96), KEYS[1]: (128, 96), KEYS[2]: (13, 128)
    }  # fmt: skip
    assert found[KEYS[0]].getpixel((5, 5)) == pytest.approx((254, 0, 0), abs=3)
    assert all(path.stat().st_size < report.MAX_IMAGE_BYTES for path in tmp_path.glob("thumbnails/*"))
    logged(tmp_path, pictures=pictures)
    assert pictures.opened == KEYS, "a file that is there is not made again"


def test_the_console_says_where_an_image_is_and_how_large(tmp_path):
    out = io.StringIO()
    logged(tmp_path, Console(file=out, width=200, markup=False))
    text = out.getvalue()
    assert "see [image 640x480] and [image 640x480]?" in text and "see <|pad|>" not in text
    assert "text of <|pad|>" in text, "that is no image"


def test_wandbs_table_has_a_picture_of_all_images_of_a_row(tmp_path, monkeypatch):
    import wandb

    run = OnlineRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    logged(tmp_path, wandb=True)
    (table,) = (told["completions"] for name, told in run.told if name == "log")
    assert table.columns[-1] == "images" and table.columns[1] == "prompt"
    shown = [row[-1] for row in table.data]
    assert shown[2] is None
    assert [(image.image.width, image.image.height) for image in shown[:2]] == [
        (128 + 4 + 128 + 4 + 13, 128),
        (260, 96),
    ]
    assert table.data[0][1] == "see [image 640x480] and [image 640x480]?"


def test_a_picture_that_is_gone_is_a_warning(tmp_path, caplog):
    class Gone(Drawn):
        def picture(self, key, content=None):
            if key == KEYS[0]:
                raise OSError(f"no file {key[-1]}")
            return super().picture(key, content)

    assert len(logged(tmp_path, pictures=Gone())) == 3
    assert {path.stem for path in tmp_path.glob("thumbnails/*")} == set(KEYS[1:])
    assert "no thumbnail of an image: no file 0" in caplog.text


def test_a_run_has_so_many_thumbnails_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(thumbnails, "MOST", 2)
    logged(tmp_path)
    assert len([*tmp_path.glob("thumbnails/*")]) == 2
    assert "has 2 thumbnails; images that come later get none" in caplog.text


def test_the_bound_is_that_of_the_run_and_not_of_each_of_its_parts(tmp_path, monkeypatch):
    """Trackers, made at the start, write behind an evaluation, and behind another."""
    monkeypatch.setattr(thumbnails, "MOST", 3)
    images = [Image(f"{i:064x}", (), (64, 32), file_of((64, 32))) for i in range(10)]
    of_trackers = thumbnails.Thumbnails(tmp_path, Drawn())
    thumbnails.Thumbnails(tmp_path, Drawn()).keep(images[:2])
    of_trackers.keep(images[4:])
    thumbnails.Thumbnails(tmp_path, Drawn()).keep(images)
    assert sorted(path.stem for path in tmp_path.glob("thumbnails/*")) == [images[i].key for i in (0, 1, 4)]


def test_a_run_that_is_killed_leaves_no_half_of_a_thumbnail(tmp_path, monkeypatch):
    image = Image(KEYS[0], (), (64, 32), file_of((64, 32)))
    whole = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        whole(path, data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        thumbnails.Thumbnails(tmp_path, Drawn()).keep([image])
    monkeypatch.setattr(Path, "write_bytes", whole)
    assert not list(tmp_path.glob("thumbnails/*"))
    left = tmp_path / "thumbnails" / f".{KEYS[0]}.jpg.1"  # by a process that had no time to remove it
    left.write_bytes(b"half")
    thumbnails.Thumbnails(tmp_path, Drawn()).keep([image])
    assert pillow.open(tmp_path / "thumbnails" / f"{KEYS[0]}.jpg").size == (64, 32)


def test_wandb_goes_on_beside_a_thumbnail_that_does_not_open(tmp_path, caplog):
    images = [Image(key, (), (64, 32), file_of((64, 32))) for key in KEYS]
    thumbnails.Thumbnails(tmp_path, Drawn()).keep(images)
    paths = [tmp_path / "thumbnails" / f"{key}.jpg" for key in KEYS]
    paths[0].write_bytes(paths[0].read_bytes()[:-300])
    paths[1].write_bytes(b"none")
    assert thumbnails.sheet(paths).size == (64, 32)
    assert thumbnails.sheet(paths[:2]) is None
    assert caplog.text.count("this thumbnail cannot be read and is left out; remove it") == 4


def report_of(folder: Path, rows: list[dict]):
    run = write(folder / "run", [metrics(1)], [sample(1) | {"images": [], "told_images": []} | row for row in rows])
    (run / "thumbnails").mkdir()
    for key in KEYS:
        thumbnails.Thumbnails(run, Drawn()).keep([Image(key, (), None, file_of((200, 100)))])
    return page_of(run), run


def test_the_report_holds_the_thumbnails_itself(tmp_path):
    """Those of rows that are in it, each once; an image without one is its size."""
    image, other, none = ({"key": key, "size": [200, 100]} for key in (KEYS[2], KEYS[0], "f" * 64))
    page, run = report_of(tmp_path, [{"images": [image, other]}, {"images": [image], "told_images": [none]}, {}])
    data = page.data
    files = [base64.b64encode((run / "thumbnails" / f"{key}.jpg").read_bytes()).decode() for key in (KEYS[2], KEYS[0])]
    assert data["images"] == files
    seen = "[image 200x100]"
    assert [row[8:] for row in data["samples"]] == [[[[0, seen], [1, seen]], []], [[[0, seen]], [[-1, seen]]], []]
    assert "1 of 3 images have no thumbnail here; their sizes are shown." in page.all("p")[-1][1]
    (policy,) = (own["content"] for own, _ in page.all("meta") if "http-equiv" in own)
    assert policy is not None and re.search(r"default-src 'none';.*; img-src data:$", policy)


@pytest.mark.parametrize(
    ("name", "limit", "kept"), [("MAX_IMAGES", 1, 1), ("MAX_IMAGES_BYTES", 1500, 1), ("MAX_IMAGE_BYTES", 9, 0)]
)
def test_the_reports_images_are_limited(tmp_path, monkeypatch, name, limit, kept):
    monkeypatch.setattr(report, name, limit)
    page, run = report_of(tmp_path, [{"images": [{"key": key, "size": [200, 100]} for key in KEYS]}])
    assert all(700 < path.stat().st_size < 1500 for path in run.glob("thumbnails/*"))
    assert len(page.data["images"]) == kept
    assert f"{3 - kept} of 3 images have no thumbnail here" in page.all("p")[-1][1]


@pytest.mark.parametrize("key", ["../config", "/etc/passwd", "x" * 64, ""])
def test_a_key_that_is_no_hash_names_no_file(tmp_path, key):
    page, run = report_of(tmp_path, [{"images": [{"key": key, "size": [1, 1]}]}])
    (run / "config.jpg").write_bytes(b"secret")
    assert page_of(run).data["images"] == [] == page.data["images"]
    assert not list(thumbnails.paths_of(run / "thumbnails", {"images": [{"key": key}]}))


def test_an_image_is_the_prompts_or_was_told_later():
    (made, _) = groups()
    first, later = thumbnails.images_of(made.prompt, made.episodes[0])
    assert [image.key for image in first] == KEYS[:2] and [image.key for image in later] == KEYS[2:]
    again = Sample([1, 9, 9, 2], [8, 9], [], [], images=PromptImages((*first, later[0]._replace(runs=((5, 6),))), []))
    made.episodes[0].samples.append(again)  # of a history that was written anew
    assert thumbnails.images_of(made.prompt, made.episodes[0])[1] == later
