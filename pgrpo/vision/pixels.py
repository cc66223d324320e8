"""Pixels of images by key, made in threads ahead of their use. Decoding, resizing and normalising release Python's lock."""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from torch import Tensor

Pixels = dict[str, Tensor]
"""What an image processor makes of one image."""
KEPT_BYTES = 2**30
"""The most memory of pixels that wait for their use or are kept for the next one, beside those that are being made."""
THREADS = 8
"""The most threads of a process."""


class PixelStore:
    """Makes an image's pixels once for as long as they are kept, however many threads and calls want them.

    Args:
        make: makes the pixels of the image with this key; with its file, or None. Several threads call it. An error is raised where
            the pixels are asked for, and the next call tries again.
        knows: whether an image can be made without its file, and so ahead.
        most_bytes: of what is kept. Those that were used longest ago are dropped first, and those announced by ``prepare`` and not
            used yet not at all: threads wait instead.
    """

    def __init__(
        self,
        make: Callable[[str, bytes | None], Pixels],
        knows: Callable[[str], bool] = lambda _: True,
        most_bytes: int = KEPT_BYTES,
    ) -> None:
        self._make, self._knows, self._most_bytes = make, knows, most_bytes
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._threads = max(1, min(THREADS, (os.cpu_count() or 1) // ranks))
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Lock()
        self._busy = 0
        self._found: OrderedDict[str, Future[Pixels]] = OrderedDict()  # made or being made; used last at the end
        self._wanted: deque[str] = deque()  # to be made, in this order
        self._awaited: set[str] = set()  # announced and not used yet

    def prepare(self, keys: Sequence[str]) -> None:
        """Announce all images that are needed from now on, in order. What was announced before and has not begun is not made."""
        with self._lock:
            keys = [key for key in dict.fromkeys(keys) if self._knows(key)]
            self._awaited = set(keys)
            self._wanted = deque(key for key in keys if key not in self._found)
            self._begin()

    def hurry(self, keys: Sequence[str]) -> None:
        """Make these, which are used next, before others."""
        with self._lock:
            first = [key for key in dict.fromkeys(keys) if key not in self._found and self._knows(key)]
            self._wanted = deque([*first, *(key for key in self._wanted if key not in first)])
            self._begin()

    def __call__(self, key: str, content: bytes | None = None) -> Pixels:
        """The pixels of an image, which are not to be changed; ``content``: its file, if only the caller has it."""
        with self._lock:
            self._awaited.discard(key)
            future = self._found.get(key)
            if is_own := future is None:
                if key in self._wanted:
                    self._wanted.remove(key)
                future = self._found[key] = Future()
            self._found.move_to_end(key)
            self._begin()  # there may be room for another now
        if is_own:
            self._run(key, future, content)
        return future.result()

    def _begin(self) -> None:
        """Let as many threads work as there is work and room for."""
        while self._wanted and self._busy < self._threads and self._has_room():
            self._pool = self._pool or ThreadPoolExecutor(self._threads, thread_name_prefix="pgrpo-images")
            key = self._wanted.popleft()
            future = self._found[key] = Future()
            self._busy += 1
            self._pool.submit(self._work, key, future)

    def _work(self, key: str, future: Future[Pixels]) -> None:
        self._run(key, future)
        with self._lock:
            self._busy -= 1
            self._begin()

    def _run(self, key: str, future: Future[Pixels], content: bytes | None = None) -> None:
        try:
            future.set_result(self._make(key, content))
        except BaseException as error:
            with self._lock:
                self._found.pop(key, None)
            future.set_exception(error)
        with self._lock:
            self._drop()

    def _has_room(self) -> bool:
        return sum(_bytes(future) for key, future in self._found.items() if key in self._awaited) < self._most_bytes

    def _drop(self) -> None:
        total = sum(map(_bytes, self._found.values()))
        for key in [key for key, future in self._found.items() if future.done() and key not in self._awaited][:-1]:
            if total <= self._most_bytes:
                return
            total -= _bytes(self._found.pop(key))


def _bytes(future: Future[Pixels]) -> int:
    """0 of what is being made."""
    return sum(x.numel() * x.element_size() for x in future.result().values()) if future.done() else 0
