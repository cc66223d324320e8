"""What the stand-in has as a name only."""

from typing import Any


class Missing:
    """Raises when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"the stand-in of torchvision has no {self._name}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")


def missing(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing(name)
