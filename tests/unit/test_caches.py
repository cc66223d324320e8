"""Compiled code of all kinds is kept in one folder, which nobody else moves."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from pgrpo.config import Config, ConfigError
from pgrpo.distributed.world import World
from pgrpo.process.caches import FLASH4, FOLDERS, TUNED, cache_root, disk_full, keeping_caches, use_caches
from pgrpo.process.tuning import CACHE_MODE, CONFIG_DIR
from pgrpo.training import session
from pgrpo.training.caller import Given
from pgrpo.training.progress import Progress


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in (*FOLDERS, FLASH4, TUNED, CONFIG_DIR, CACHE_MODE):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)


def test_every_package_keeps_its_code_below_the_folder(tmp_path):
    use_caches(str(tmp_path / "new" / "caches"))
    found = {name: Path(os.environ[name]) for name in FOLDERS}
    assert len(set(found.values())) == 5
    assert all(path.parent == tmp_path / "new" / "caches" for path in found.values())
    assert os.environ[FLASH4] == os.environ[TUNED] == "1"


def test_what_a_user_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv(FLASH4, "0")
    monkeypatch.setenv(TUNED, "0")
    use_caches(str(tmp_path))
    assert [os.environ[name] for name in ("TRITON_CACHE_DIR", FLASH4, TUNED)] == ["/elsewhere", "0", "0"]


def test_the_folder_that_pytorch_sets_when_it_is_imported_gives_way(tmp_path):
    """In a process that nobody told where to compile, as importing pgrpo.grpo imports torch._dynamo."""
    code = "import os, sys, torch._dynamo; before = os.environ['TORCHINDUCTOR_CACHE_DIR']\n"
    code += "from pgrpo.process.caches import use_caches; use_caches(sys.argv[1])\n"
    code += "print(before, os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    before, after = result.stdout.split()
    assert (before, after) == (default_cache_dir(), str(tmp_path / "inductor"))


def test_without_a_key_it_is_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root(None) == tmp_path / "pgrpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root(None) == Path("~/.cache/pgrpo").expanduser()
    assert cache_root("~/code") == Path("~/code").expanduser()


def test_a_folder_that_cannot_be_made_is_told_and_packages_use_their_own(tmp_path, caplog):
    (tmp_path / "file").touch()
    use_caches(str(tmp_path / "file" / "caches"))
    assert "the next run compiles again" in caplog.text
    assert not os.environ.keys() & {*FOLDERS, FLASH4, TUNED}


@pytest.mark.parametrize("part", ["inductor", "vllm"])
def test_a_folder_that_cannot_be_written_is_told_and_packages_use_their_own(tmp_path, monkeypatch, caplog, part):
    """Another user's, or on a disk that is mounted for reading: packages fail in such a folder when they compile."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / part and access(path, mode))
    use_caches(str(tmp_path))
    (said,) = caplog.messages
    assert said.startswith(f"cache_dir: {tmp_path} cannot be used ({tmp_path / part} cannot be written)")
    assert not os.environ.keys() & {*FOLDERS, FLASH4, TUNED}


def test_a_folder_whose_code_cannot_be_loaded_is_told_and_packages_use_their_own(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOSUID | os.ST_NOEXEC))
    use_caches(str(tmp_path))
    (said,) = caplog.messages
    assert said.startswith(
        f"cache_dir: {tmp_path} cannot be used ({tmp_path / 'inductor'} is on a disk that is mounted noexec"
    )
    assert not os.environ.keys() & {*FOLDERS, FLASH4, TUNED}


def test_a_folder_that_a_user_has_set_is_not_looked_at(tmp_path, monkeypatch, caplog):
    (tmp_path / "triton").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    use_caches(str(tmp_path))
    assert not caplog.messages and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")


def test_an_error_of_a_full_disk_names_the_folder_and_its_key(tmp_path):
    """As torch.compile passes it on: of its text the first line is the system's, and the rest is advice for PyTorch's authors."""
    for code in (errno.ENOSPC, errno.EDQUOT):
        said = str(
            disk_full(
                RuntimeError(f"OSError: {OSError(code, os.strerror(code))}\n\nSet TORCH_LOGS"), str(tmp_path / "new")
            )
        )
        assert said.startswith(
            f"a disk is full ([Errno {code}] {os.strerror(code)}). Compiled code is kept in {tmp_path / 'new'}, "
        )
        assert said.endswith(" MiB are free: make room there, or set cache_dir to a folder on another disk")
    assert disk_full(OSError(errno.EACCES, "Permission denied"), None) is None
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "new" / "inductor" / "a.so"))
    assert "set cache_dir" in str(disk_full(full, str(tmp_path / "new")))
    assert disk_full(full, str(tmp_path / "other")) is None, "the full disk is another one, which the error names"


@pytest.mark.parametrize("when", ["it starts", "it trains"])
def test_a_run_that_ends_by_a_full_disk_says_so(monkeypatch, when):
    world = World(0, 1, torch.device("cpu"))
    broken: Any = session.Session.__new__(session.Session)
    broken.parts, broken.progress = SimpleNamespace(config=Config(), world=world), Progress()

    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def trains():
        with broken.saving_what_is_finished():
            fails()

    monkeypatch.setattr(session, "build", fails)
    with pytest.raises(RuntimeError, match="set cache_dir"):
        session._built(Config(), world, Given()) if when == "it starts" else trains()


def test_a_disk_that_is_too_full_for_a_models_files_is_not_that_of_compiled_code(monkeypatch):
    def fails(*_):
        raise ConfigError(f"model.path=x: cannot load its weights: {OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}")

    monkeypatch.setattr(session, "build", fails)
    with pytest.raises(ConfigError, match=r"model\.path=x: cannot load its weights: \[Errno 28\]"):
        session._built(Config(), World(0, 1, torch.device("cpu")), Given())


def test_what_vllm_sets_is_taken_back(tmp_path):
    use_caches(str(tmp_path))
    before = os.environ.pop("TRITON_CACHE_DIR") and dict(os.environ)
    with keeping_caches():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = "vllm's"
    assert dict(os.environ) == before


@pytest.mark.parametrize(("given", "kept"), [("none", "ieee"), ("tf32", "tf32")])
def test_keys_of_cached_code_are_those_that_they_are_beside_vllm(tmp_path, given, kept):
    """vLLM calls ``set_float32_matmul_precision("highest")``. What a user has set stays."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, given
    try:
        use_caches(str(tmp_path))
        assert matmul.fp32_precision == kept
        if given == "none":
            torch.set_float32_matmul_precision("highest")
            assert matmul.fp32_precision == kept
    finally:
        matmul.fp32_precision = before
