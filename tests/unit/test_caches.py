"""Compiled code of all kinds is kept in one folder, which nobody else moves."""

import os
from pathlib import Path

import pytest

from pgrpo.process.caches import FLASH4, FOLDERS, cache_root, keeping_caches, use_caches


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in (*FOLDERS, FLASH4):
        monkeypatch.setenv(name, "")  # so that it is put back after the test
        monkeypatch.delenv(name)


def test_every_package_keeps_its_code_below_the_folder(tmp_path):
    use_caches(str(tmp_path / "new" / "caches"))
    found = {name: Path(os.environ[name]) for name in FOLDERS}
    assert len(set(found.values())) == 4
    assert all(path.parent == tmp_path / "new" / "caches" for path in found.values())
    assert os.environ[FLASH4] == "1"


def test_what_a_user_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    monkeypatch.setenv(FLASH4, "0")
    use_caches(str(tmp_path))
    assert (os.environ["TRITON_CACHE_DIR"], os.environ[FLASH4]) == ("/elsewhere", "0")


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
    assert not os.environ.keys() & {*FOLDERS, FLASH4}


def test_what_vllm_sets_is_taken_back(tmp_path):
    use_caches(str(tmp_path))
    before = os.environ.pop("TRITON_CACHE_DIR") and dict(os.environ)
    with keeping_caches():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TRITON_CACHE_DIR"] = "vllm's"
    assert dict(os.environ) == before
