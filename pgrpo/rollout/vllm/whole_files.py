"""What vLLM keeps of compiled code is written whole or not at all, also by a process that is killed while it writes.

vLLM replaces its files of code atomically, but not ``vllm_compile_cache.py``, the list of them (``CompilerManager.save_to_file``,
0.32 and older). It reads that at its next start, which fails where the list has no end.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def whole_files() -> Iterator[None]:
    """Inside this block, where an engine starts, the list is written beside its place, and then moved there."""
    manager: Any = importlib.import_module("vllm.compilation.backends").CompilerManager
    save = manager.save_to_file

    def save_whole(self: Any) -> None:
        place = self.cache_file_path
        self.cache_file_path = beside = f"{place}.{os.getpid()}.tmp"
        try:
            save(self)
        finally:
            self.cache_file_path = place
        if os.path.exists(beside):  # there is something new
            os.replace(beside, place)

    with patch.object(manager, "save_to_file", save_whole):
        yield
