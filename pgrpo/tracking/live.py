"""Progress on the terminal: how far the work in hand is, and about how long it still takes.

Ambient, as logging is: code that works says ``with counting("rollout", 32, "prompts") as count: ... count.done += 1``. It is shown
while a ``showing`` block is open in this process: on a terminal as a bar, elsewhere as a line every ``PLAIN_EVERY_S``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

T = TypeVar("T")
REFRESH_S = 0.2
PLAIN_EVERY_S = 30.0
"""Where there is no terminal, a phase says how far it is when nothing was said for so long."""


def duration(seconds: float) -> str:
    """``8.4 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


class Count:
    """A phase of the work. ``done`` of ``total`` items are finished; whoever works adds to it, or ``poll`` says it."""

    def __init__(self, what: str, total: int | None, unit: str, poll: Callable[[], int] | None) -> None:
        self.what, self.total, self.unit, self.poll = what, total, unit, poll
        self.done, self.started = 0, time.monotonic()

    def text(self, usual_s: float | None) -> str:
        """``12/32 prompts, 40 s, about 1 min 07 s left``. ``usual_s``: seconds that an item of this phase took the last time."""
        elapsed = time.monotonic() - self.started
        if self.total is None:
            return duration(elapsed)
        self.done = self.poll() if self.poll else self.done
        left = None if usual_s is None else usual_s * self.total - elapsed
        if left is None or left < 0:
            left = elapsed * (self.total - self.done) / self.done if self.done else None
        ahead = "" if left is None else f", about {duration(left)} left"
        return f"{self.done}/{self.total} {self.unit}, {duration(elapsed)}{ahead}"


class _Display:
    """Shows one phase at a time."""

    def __init__(self, console: Console) -> None:
        self.console, self.title = console, ""
        self._usual_s: dict[str, float] = {}  # phase -> seconds of an item
        self._said = time.monotonic()

    @contextmanager
    def show(self, count: Count) -> Iterator[None]:
        over = threading.Event()
        run = self._draw if self.console.is_terminal else self._say
        thread = threading.Thread(target=run, args=(count, over), name="pgrpo-progress", daemon=True)
        thread.start()
        try:
            yield
            if count.total:
                self._usual_s[count.what] = (time.monotonic() - count.started) / count.total
        finally:
            over.set()
            thread.join()

    def _text(self, count: Count) -> str:
        return count.text(self._usual_s.get(count.what))

    def _draw(self, count: Count, over: threading.Event) -> None:
        if over.wait(REFRESH_S):  # too short to be seen
            return
        columns = TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[text]}")
        name = f"{self.title}  {count.what}" if self.title else count.what
        with suppress(OSError), Progress(*columns, console=self.console, auto_refresh=False, transient=True) as bar:
            task = bar.add_task(name, total=count.total, text=self._text(count))
            while True:
                bar.update(task, text=self._text(count), completed=count.done, refresh=True)
                if over.wait(REFRESH_S):
                    return

    def _say(self, count: Count, over: threading.Event) -> None:
        while not over.wait(max(0.0, self._said + PLAIN_EVERY_S - time.monotonic())):
            with suppress(OSError):
                title = f"{self.title}: " if self.title else ""
                self.console.print(f"{title}{count.what} {self._text(count)}", soft_wrap=True)
            self._said = time.monotonic()


_display: _Display | None = None


@contextmanager
def showing(console: Console | None) -> Iterator[None]:
    """Show progress on ``console`` inside this block; on None show none."""
    global _display
    before, _display = _display, console and _Display(console)
    try:
        yield
    finally:
        _display = before


def entitle(title: str) -> None:
    """What the next phases belong to: ``step 3/100``."""
    if _display:
        _display.title = title


@contextmanager
def counting(
    what: str, total: int | None = None, unit: str = "", poll: Callable[[], int] | None = None
) -> Iterator[Count]:
    """A phase of the work, until the end of the block. ``total`` None: its end cannot be told, so only the time is shown."""
    count = Count(what, total, unit, poll)
    if _display is None:
        yield count
        return
    with _display.show(count):
        yield count


def watched(what: str, items: Sequence[T], unit: str) -> Iterable[T]:
    """The items, one by one, as a phase."""
    with counting(what, len(items), unit) as count:
        for item in items:
            yield item
            count.done += 1
