"""The stop flag, which a signal sets, and the exception that ends work in progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """Signal ``signum`` stops the run. A ``BaseException``, so that no ``except Exception`` takes it for an error."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopFlag:
    """``signum``: the stop signal that this process received, or 0."""

    def __init__(self) -> None:
        self.signum = 0
        self._breaking_off = False

    def set(self, signum: int) -> None:
        """Called by a signal handler. Raises ``Stopped`` inside ``breaking_off``."""
        self.signum = signum
        if self._breaking_off:
            raise Stopped(signum)

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Inside this block a signal raises ``Stopped`` at once; if one already arrived, ``Stopped`` is raised on entry."""
        if self.signum:
            raise Stopped(self.signum)
        self._breaking_off = True
        try:
            yield
        finally:
            self._breaking_off = False
