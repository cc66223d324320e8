"""Classes of vLLM's own for models that it builds of transformers' code.

Where vLLM has no code for a model, it builds the model of transformers' classes (its "Transformers backend", 0.26 to 0.32). To
compile, it decorates the decoder's class (``_support_torch_compile``): ``__init__`` then wants vLLM's config, and ``__call__``
reads what that ``__init__`` left in the instance. The policy is of the same class, so it could not be called any more. Here the
decorator gets a subclass instead, and the model that vLLM builds is of that. Modules inside it vLLM changes one instance at a time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedModel


@contextmanager
def own_classes() -> Iterator[None]:
    """Inside this block, where an engine starts and no other model is made, what vLLM decorates of transformers is its own."""
    decorators: Any = importlib.import_module("vllm.compilation.decorators")
    decorate = decorators._support_torch_compile
    with ExitStack() as changed:

        def decorate_own(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if not issubclass(cls, PreTrainedModel):
                return decorate(cls, *args, **kwargs)
            # The same name, by which transformers finds what it keeps for a class.
            names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
            own = decorate(type(cls.__name__, (cls,), names), *args, **kwargs)
            changed.enter_context(patch.object(cls, "__init__", _made_as(cls, own)))
            return own

        changed.enter_context(patch.object(decorators, "_support_torch_compile", decorate_own))
        yield


def _made_as(cls: Any, other: Any) -> Any:
    """``cls.__init__``, for now: an instance of ``cls`` becomes one of its subclass ``other``."""
    init = cls.__init__

    @functools.wraps(init)
    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls:
            object.__setattr__(self, "__class__", other)
            other.__init__(self, *args, **kwargs)
        else:
            init(self, *args, **kwargs)

    return make
