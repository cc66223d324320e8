"""A process that is killed while vLLM writes leaves no half file; ``tests/vllm/test_vllm_ahead.py`` asks the real class."""

import importlib
import os
import signal
import sys
from pathlib import Path

import pytest

from pgrpo.rollout.vllm.whole_files import whole_files

FAKES = str(Path(__file__).parents[1] / "fakes")


@pytest.fixture
def manager(monkeypatch):
    monkeypatch.syspath_prepend(FAKES)
    yield importlib.import_module("vllm.compilation.backends").CompilerManager
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


class Killed(dict[int, str]):
    """A list that a process does not write to its end."""

    def values(self):
        yield "new"
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_list_is_there_whole_or_as_it_was(manager, tmp_path):
    file = tmp_path / "vllm_compile_cache.py"
    save = manager.save_to_file
    for written in ("one", "other"):
        with whole_files():
            one = manager(str(file), {1: written, 2: "more"})
            one.save_to_file()
            manager(str(file), {}).save_to_file()  # nothing new
        assert file.read_text() == f"{written}\nmore\n" and one.cache_file_path == str(file)
    assert os.listdir(tmp_path) == [file.name] and manager.save_to_file is save
    if (child := os.fork()) == 0:
        with whole_files():
            manager(str(file), Killed({1: ""})).save_to_file()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL and file.read_text() == "other\nmore\n"
    assert len(os.listdir(tmp_path)) == 2, "what it began"
