"""What a stop signal does to the work in progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """The run was told to stop, by signal ``signum``. Not an ``Exception``: what runs must not take it for a fault of its own."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopFlag:
    """Whether this process was told to stop: ``signum``, 0 while it was not."""

    def __init__(self) -> None:
        self.signum = 0
        self._breaking_off = False

    def set(self, signum: int) -> None:
        """From a signal handler. Raises ``Stopped`` inside ``breaking_off``."""
        self.signum = signum
        if self._breaking_off:
            raise Stopped(signum)

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """A signal ends what runs in here at once, in the middle, with ``Stopped``; so does one that came before."""
        if self.signum:
            raise Stopped(self.signum)
        self._breaking_off = True
        try:
            yield
        finally:
            self._breaking_off = False
