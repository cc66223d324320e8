"""Pixels that are made ahead: once, in order, within their memory, with their errors."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock

import pytest
import torch

from pgrpo.vision import pixels
from pgrpo.vision.pixels import PixelStore


class Maker:
    """Makes 400 bytes of an image; those in ``held`` wait."""

    def __init__(self, *held: str) -> None:
        self.made, self.go, self.held, self.lock = list[str](), Event(), held, Lock()

    def __call__(self, key: str, content: bytes | None = None) -> dict[str, torch.Tensor]:
        with self.lock:
            self.made.append(key)
        if key in self.held:
            assert self.go.wait(60)
        if key == "bad":
            raise ValueError("row 3, bad.png: broken")
        return {"pixels": torch.full((100,), float(ord(key[0])))}


def settle(store: PixelStore) -> None:
    until = time.monotonic() + 60
    while store._busy:
        assert time.monotonic() < until
        time.sleep(0.002)


def test_an_image_is_made_once_whoever_asks(monkeypatch):
    """Before it was begun, while it is made, and after; by several threads."""
    maker = Maker("a")
    store = PixelStore(maker)
    store.prepare("ab")
    with ThreadPoolExecutor(4) as callers:
        asked = [callers.submit(store, key) for key in "aabbcc"]
        maker.go.set()
        found = [future.result() for future in asked]
    store.prepare("abc")
    settle(store)
    assert sorted(maker.made) == ["a", "b", "c"]
    assert [int(one["pixels"][0]) for one in found] == [97, 97, 98, 98, 99, 99]
    assert found[0] is found[1] is store("a")


@pytest.mark.parametrize("threads", [1, 3])
def test_images_are_made_in_the_order_of_their_use(monkeypatch, threads):
    """What is used next comes first; a later announcement replaces what has not begun."""
    monkeypatch.setattr(pixels, "THREADS", threads)
    monkeypatch.setattr(pixels.os, "cpu_count", lambda: 8)
    maker = Maker("a", "b", "c")
    store = PixelStore(maker)
    store.prepare("abcdefg")
    assert store._busy == threads
    store.hurry("gf")
    store.prepare("abcxyde")
    store.hurry("ed")
    maker.go.set()
    settle(store)
    order = [*"abc", *"edxy"]
    assert sorted(maker.made) == sorted(order) if threads > 1 else maker.made == [*"a", *"edbcxy"]


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.setattr(pixels.os, "cpu_count", lambda: 16)
    for ranks, threads in ((1, 8), (4, 4), (32, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert PixelStore(Maker())._threads == threads


def test_threads_wait_where_memory_is_full_of_images_that_were_not_used(monkeypatch):
    """With room for two images: another is made as soon as one was used, and the one that was used longest ago is dropped."""
    monkeypatch.setattr(pixels, "THREADS", 1)
    maker = Maker()
    store = PixelStore(maker, most_bytes=800)
    store.prepare("abcde")
    settle(store)
    assert maker.made == ["a", "b"]
    store("a")
    settle(store)
    assert maker.made == ["a", "b", "c"]
    for key in "bce":
        store(key)
    settle(store)
    assert sorted(maker.made) == sorted("abcde")
    kept = set(store._found)
    assert "d" in kept and "e" in kept and len(kept) == 2
    store.prepare([])  # d is not needed any more, so it is the first to go
    for key in "xyxz":
        store(key)
    assert set(store._found) == {"x", "z"}


def test_an_image_that_comes_with_its_file_is_made_when_it_is_asked():
    """And others ahead."""
    given = list[tuple[str, bytes | None]]()

    def make(key: str, content: bytes | None) -> dict[str, torch.Tensor]:
        given.append((key, content))
        return {}

    store = PixelStore(make, {"a", "b"}.__contains__)
    store.prepare("axb")
    store.hurry("yx")
    settle(store)
    assert sorted(given) == [("a", None), ("b", None)]
    assert store("x", b"file") is store("x")
    assert given[2:] == [("x", b"file")]


def test_an_error_is_that_of_its_image_each_time_it_is_asked():
    """Made ahead or not; others are not concerned."""
    maker = Maker()
    store = PixelStore(maker)
    store.prepare(["a", "bad", "b"])
    settle(store)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^row 3, bad\.png: broken$"):
            store("bad")
    assert maker.made.count("bad") == 3
    assert int(store("b")["pixels"][0]) == 98
