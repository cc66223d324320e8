"""Faults are injected for real: processes are killed, bytes flipped, a small disk filled."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from pgrpo import checkpoint
from pgrpo.checkpoint import (
    CheckpointError,
    latest,
    list_steps,
    load,
    prune,
    save,
    set_aside_after,
    tidy,
)
from pgrpo.checkpoint.files import dump_scalars, write_shards
from pgrpo.checkpoint.folder import begin, publish
from pgrpo.checkpoint.shards import Shard, whole
from pgrpo.config import Config, ConfigError
from pgrpo.process.lock import check_shared, open_run_dir
from pgrpo.training.evaluation import own_folder


def small(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((4, 3), float(step))}, "optimizer": {"w.exp_avg": torch.full((4, 3), step / 7)}}


def flip_bit(file: Path, position: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def python(code: str, *args: object, **kwargs) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **kwargs
    )


def test_round_trip_is_bit_equal(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    tensors = {
        "model": {
            "bf16": base.bfloat16(),
            "transposed": base.t(),
            "strided": torch.randn(10, generator=generator)[::3],
        },
        "state": {
            "scalar": torch.tensor(3, dtype=torch.int64),
            "rng": generator.get_state(),
            "empty": torch.zeros(0, 5),
            "double": torch.tensor(torch.pi, dtype=torch.float64),
            "flag": torch.tensor([True, False]),
            "nan": torch.tensor([float("nan"), float("-inf")]),
        },
    }
    scalars = {"step": 12, "lr": 0.1 + 0.2, "order": {"epoch": 3, "position": [1, 2]}, "name": "é\u2028", "none": None}
    path = save(tmp_path, 12, tensors, scalars)
    got, got_scalars = load(path)
    assert set(load(path, only=("model",))[0]) == {"model"}
    assert path == tmp_path / "step_12" and got_scalars == scalars
    assert {name: set(named) for name, named in got.items()} == {name: set(named) for name, named in tensors.items()}
    for name, named in tensors.items():
        for key, tensor in named.items():
            assert got[name][key].dtype == tensor.dtype and got[name][key].shape == tensor.shape
            as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (got[name][key], tensor)]
            assert torch.equal(*as_bytes), key


def test_only_safetensors_and_json(tmp_path):
    path = save(tmp_path, 1, small(1), {"a": 1})
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json",
        "model.0.safetensors",
        "optimizer.0.safetensors",
        "scalars.json",
    ]


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.faults
@pytest.mark.parametrize("name", [".metadata", "extra.pkl", "model.0.safetensors", "scalars.json", "manifest.json"])
@pytest.mark.parametrize("manifest_agrees", [True, False])
def test_a_hostile_pickle_is_never_unpickled(tmp_path, name, manifest_agrees):
    """Beside the files it is not looked at; in the place of one it is refused, also where the manifest has its sum."""
    path, struck = save(tmp_path, 1, small(1), {}), tmp_path / "struck"
    hostile = pickle.dumps(Hostile(f"touch {struck}"))
    torch.save(Hostile(f"touch {struck}"), path / "torch.pt")
    (path / name).write_bytes(hostile)
    if manifest_agrees and name != "manifest.json":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = {"size": len(hostile), "sha256": hashlib.sha256(hostile).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest))
    if name in (".metadata", "extra.pkl"):
        assert set(load(path)[0]) == {"model", "optimizer"}
    else:
        with pytest.raises(CheckpointError, match=r"step_1"):
            load(path)
    assert not struck.exists()
    pickle.loads(hostile)
    assert struck.exists()  # it does strike whoever unpickles it


@pytest.mark.parametrize("file", ["model.0.safetensors", "optimizer.0.safetensors", "scalars.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.faults
def test_a_damaged_checkpoint_is_refused_and_latest_falls_back(tmp_path, caplog, file, damage):
    for step in (1, 2):
        save(tmp_path, step, small(step), {"step": step})
    bad = tmp_path / "step_2" / file
    if damage == "flip":
        flip_bit(bad)
    elif damage == "truncate":
        bad.write_bytes(bad.read_bytes()[:-1])
    else:
        bad.unlink()
    wrong = {
        "flip": "sha256 differs",
        "truncate": f"{bad.stat().st_size if bad.exists() else 0} bytes",
        "remove": "missing",
    }[damage]
    with pytest.raises(CheckpointError, match=f"{re.escape(str(bad))}: .*{wrong}"):
        load(tmp_path / "step_2")
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "step_1"
    assert "step_2 is broken and skipped" in caplog.text and file in caplog.text and wrong in caplog.text
    assert load(tmp_path / "step_1")[1] == {"step": 1}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"step": 2}', '{"step": 2, "files": {}}', '{"step": 3, "files": {}}']
)
def test_broken_manifest(tmp_path, content):
    path = save(tmp_path, 2, small(2), {})
    (path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"step_2/manifest\.json"):
        load(path)
    assert latest(tmp_path) is None


def test_manifest_cannot_point_elsewhere(tmp_path):
    path = save(tmp_path, 2, small(2), {})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "model.0.safetensors").rename(tmp_path / "model.0.safetensors")
    manifest["files"]["../model.0.safetensors"] = manifest["files"].pop("model.0.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="missing"):
        load(path)


@pytest.mark.faults
def test_a_missing_step_is_an_error_that_lists_the_steps_that_exist(tmp_path):
    with pytest.raises(ConfigError, match="none"):
        load(tmp_path / "step_1")
    for step in (10, 9):
        save(tmp_path, step, small(step), {})
    with pytest.raises(ConfigError, match=r"no checkpoint at .*step_11; .*: 9, 10$"):
        load(tmp_path / "step_11")
    assert latest(tmp_path / "nowhere") is None


def test_steps_are_numbers_not_names(tmp_path):
    for step in (9, 10, 100):
        save(tmp_path, step, small(step), {})
    (tmp_path / "step_notes").mkdir()
    assert list_steps(tmp_path) == [9, 10, 100] and latest(tmp_path) == tmp_path / "step_100"
    prune(tmp_path, 2)
    assert list_steps(tmp_path) == [10, 100]


@pytest.mark.faults
def test_prune_never_removes_the_last_verified_checkpoint(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, small(step), {})
    for step in (3, 4, 5):
        flip_bit(tmp_path / f"step_{step}" / "model.0.safetensors")
    prune(tmp_path, 2)
    assert list_steps(tmp_path) == [2, 4, 5] and latest(tmp_path) == tmp_path / "step_2"
    with pytest.raises(ConfigError, match=r"checkpoint\.keep=0"):
        prune(tmp_path, 0)


def test_same_step_is_replaced(tmp_path):
    save(tmp_path, 4, small(4), {"run": 1})
    path = save(tmp_path, 4, small(5), {"run": 2})
    tensors, scalars = load(path)
    assert scalars == {"run": 2} and torch.equal(tensors["model"]["w"], small(5)["model"]["w"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_4"]
    # Killed between the two renames: the old one comes back.
    path.rename(tmp_path / ".replaced-step_4")
    checkpoint.tidy(tmp_path)
    assert load(path)[1] == {"run": 2}


def test_going_on_from_an_older_step_sets_newer_ones_aside(tmp_path, caplog):
    for step in (5, 10, 15):
        save(tmp_path, step, small(step), {})
    set_aside_after(tmp_path, 5)
    assert latest(tmp_path) == tmp_path / "step_5" and "abandoned_step_15" in caplog.text
    save(tmp_path, 7, small(7), {})
    prune(tmp_path, 1)
    assert sorted(e.name for e in tmp_path.iterdir()) == ["abandoned_step_10", "abandoned_step_15", "step_7"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.faults
def test_nan_or_inf_weights_are_not_saved(tmp_path, bad):
    save(tmp_path, 1, small(1), {})
    tensors = small(2)
    tensors["model"]["w"][1, 1] = bad
    with pytest.raises(CheckpointError, match="model weight w holds NaN or inf"):
        save(tmp_path, 2, tensors, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_1"]


def test_tied_tensors_are_refused(tmp_path):
    weight = torch.ones(3, 3)
    with pytest.raises(CheckpointError, match=r"embed and head share memory"):
        save(tmp_path, 1, {"model": {"embed": weight, "head": weight}}, {})


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, float("nan"), [(1,)]])
def test_scalars_that_json_would_change_are_refused(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"'state'.*do not survive JSON"):
        save(tmp_path, 1, small(1), {"fine": [1], "state": value})
    assert list_steps(tmp_path) == []


ENDLESS_SAVES = """
    import sys, torch
    from pathlib import Path
    from pgrpo.checkpoint import save, prune
    tensors = {"model": {str(i): torch.full((500_000,), float(i)) for i in range(8)}}
    for step in range(2, 10_000):
        print(step, flush=True)
        save(Path(sys.argv[1]), step, tensors, {"step": step})
        prune(Path(sys.argv[1]), 2)
"""


@pytest.mark.faults
def test_sigkill_during_a_write_leaves_the_previous_checkpoint(warm, tmp_path):
    """Killed at several points of the save: whatever is named step_N verifies, and the leftovers go."""
    save(tmp_path, 1, small(1), {"step": 1})
    caught_writing = 0
    for attempt in range(4):
        process = warm.start(["-c", textwrap.dedent(ENDLESS_SAVES), tmp_path])
        deadline = time.monotonic() + 20
        try:
            while not process.stdout:
                assert process.poll() is None and time.monotonic() < deadline, process.stderr
                time.sleep(0.0005)
            if attempt % 2 == 0:
                # Not Path.glob: it fails on a folder that gets its name meanwhile.
                while not glob.glob(f"{tmp_path}/.writing-step_*/*") and time.monotonic() < deadline:
                    time.sleep(0.0005)
            time.sleep(0.005 * attempt)
        finally:
            process.kill()
            process.wait()
        caught_writing += bool(list(tmp_path.glob(".writing-*")))
        for step in list_steps(tmp_path):
            checkpoint.verify(tmp_path / f"step_{step}")
        newest = latest(tmp_path)
        assert newest is not None and load(newest)[1] == {"step": int(newest.name.removeprefix("step_"))}
    assert caught_writing, "no attempt was killed inside a write"
    save(tmp_path, 50_000, small(1), {})
    assert not list(tmp_path.glob(".*")) and latest(tmp_path) == tmp_path / "step_50000"


LIMITED_SAVE = """
    import resource, sys, torch
    from pathlib import Path
    from pgrpo.checkpoint import save
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save(Path(sys.argv[1]), 2, {"model": {"w": torch.zeros(1_000_000)}}, {})
"""


@pytest.mark.faults
def test_a_write_beyond_the_file_size_limit_keeps_old_checkpoints(warm, tmp_path):
    save(tmp_path, 1, small(1), {"step": 1})
    process = warm.run(["-c", textwrap.dedent(LIMITED_SAVE), tmp_path])
    assert process.returncode == 1
    said = r"step_2/model\.0\.safetensors: no space left .* needs 4000000 bytes .*checkpoint\.keep"
    assert re.search(said, process.stderr)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_1"]
    assert latest(tmp_path) == tmp_path / "step_1"


@pytest.mark.faults
def test_a_full_disk_keeps_old_checkpoints_and_names_path_and_bytes(tmp_path):
    """On a 1 MiB tmpfs, where the system lets this test mount one."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.strip()}")
    try:
        save(tmp_path, 1, small(1), {"step": 1})
        with pytest.raises(CheckpointError, match=r"step_2/model.0.safetensors: no space left .* needs 4000000 bytes"):
            save(tmp_path, 2, {"model": {"w": torch.zeros(1_000_000)}}, {})
        assert load(tmp_path / "step_1")[1] == {"step": 1} and [entry.name for entry in tmp_path.iterdir()] == [
            "step_1"
        ]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def interrupted(tensors, file, metadata):
        raise KeyboardInterrupt

    monkeypatch.setattr("pgrpo.checkpoint.files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, small(2), {})
    assert list(tmp_path.iterdir()) == []


HOLD_LOCK = """
    import sys
    from pathlib import Path
    from pgrpo.process.lock import open_run_dir
    lock = open_run_dir(Path(sys.argv[1]), resume=False)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_folder_that_another_node_does_not_see_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="does not see the folder that the first rank made"):
        check_shared(tmp_path / "run", patience_s=0.2)
    with open_run_dir(tmp_path / "run", resume=False):
        check_shared(tmp_path / "run", patience_s=0.0)


@pytest.mark.faults
def test_a_second_run_in_one_run_folder_is_refused(tmp_path):
    run_dir = tmp_path / "run"
    process = python(HOLD_LOCK, run_dir, stdin=subprocess.PIPE)
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == "held\n"
        for resume in (True, False):
            with pytest.raises(
                ConfigError, match=rf"run_dir=.*run: another run \(process {process.pid} on .*\) is using it"
            ):
                open_run_dir(run_dir, resume=resume)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()
    open_run_dir(run_dir, resume=False).close()


@pytest.mark.faults
def test_a_run_folder_with_files_needs_resume(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"not empty.*--resume auto"):
        open_run_dir(tmp_path, resume=False)
    assert not (tmp_path / ".lock").exists()
    leftover = tmp_path / "checkpoints" / ".writing-step_3"
    leftover.mkdir(parents=True)
    open_run_dir(tmp_path, resume=True).close()
    tidy(tmp_path / "checkpoints")
    assert not leftover.exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"not empty"):
        open_run_dir(tmp_path, resume=False)
    with pytest.raises(ConfigError, match=r"run_dir=.*metrics\.jsonl: cannot be used"):
        open_run_dir(tmp_path / "metrics.jsonl", resume=False)


SCALARS = {"step": 1, "best": {"step": 1, "value": 0.5}, "names": ["a", "b"], "none": None}
WHOLE = {
    "model": {"w": torch.arange(24.0).reshape(6, 4), "row": torch.arange(3.0), "none": torch.zeros(0, 5)},
    "rng_0": {"x": torch.tensor(7)},
}


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """A small checkpoint whose weights are cut in two."""
    root, files = tmp_path_factory.mktemp("two"), {}
    for rank, (low, high) in enumerate(((0, 4), (4, 6))):
        model = {"w": Shard(WHOLE["model"]["w"][low:high].clone(), (6, 4), (low, 0))}
        sets = {"model": model}
        if rank == 0:
            model |= {name: whole(WHOLE["model"][name]) for name in ("row", "none")}
            sets["rng_0"] = {"x": whole(WHOLE["rng_0"]["x"])}
        files |= write_shards(begin(root, 1), rank, sets)
    return publish(root, 1, files, dump_scalars(SCALARS))


def loads_or_refuses(path):
    """Whether it loads, and then equal to what was written; the one other way is CheckpointError with one line."""
    refused = None
    try:
        tensors, scalars = load(path)
    except CheckpointError as error:
        refused = str(error)
    if refused is not None:
        assert "\n" not in refused and "step_1" in refused
        return False
    assert scalars == SCALARS and {s: set(named) for s, named in tensors.items()} == {
        s: set(n) for s, n in WHOLE.items()
    }
    assert all(
        torch.equal(tensors[s][n], t) and tensors[s][n].dtype == t.dtype for s in WHOLE for n, t in WHOLE[s].items()
    )
    return True


def reseal(path, name, content):
    """Write a file, and its size and sum into the manifest."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.faults
def test_damage_of_any_byte_range_is_refused_or_changes_nothing(of_two_ranks, tmp_path):
    rng, outcomes = random.Random(0), []
    path = Path(shutil.copytree(of_two_ranks, tmp_path / "step_1"))
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for start in range(0, len(content), 8):
            end = start + rng.randint(1, 24)
            middle = rng.choice(
                [b"", bytes(end - start), rng.randbytes(end - start), b"[" * 100_000, b'"', content[:9]]
            )
            file.write_bytes(content[:start] + middle + content[end:])
            outcomes.append(loads_or_refuses(path))
        file.write_bytes(content)
    assert loads_or_refuses(path) and len(outcomes) > 150 and outcomes.count(False) > 0.95 * len(outcomes)


ODD_VALUES = [None, True, -1, 0, 1, 1.5, 2**62, 10**30, "", "1", "w", "\ud800", [], [[]], {}, {"w": 1}, "DEEP"]


def fields(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from fields(inner, (*path, key))


def changed(value, path, new):
    """A copy in which the field at ``path`` is ``new``; without it, if ``new`` is Ellipsis."""
    if not path:
        return new
    copy = value.copy()
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    else:
        copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


def variants(value):
    """JSON of ``value`` with each of its fields, and keys, damaged in every way."""
    for path in fields(value):
        for new in [*ODD_VALUES, *([...] if path else [])]:
            yield json.dumps(changed(value, path, new)).replace('"DEEP"', "[" * 100_000)
        if path and isinstance(path[-1], str):
            yield json.dumps(value).replace(json.dumps(path[-1]) + ":", '"other":', 1)


@pytest.mark.faults
def test_damage_of_any_field_of_the_manifest_is_refused_or_changes_nothing(of_two_ranks, tmp_path):
    path = Path(shutil.copytree(of_two_ranks, tmp_path / "step_1"))
    texts = list(variants(json.loads((path / "manifest.json").read_text())))
    for text in texts:
        (path / "manifest.json").write_text(text)
        loads_or_refuses(path)
    assert len(texts) > 200


@pytest.mark.faults
def test_damage_of_the_index_of_parts_is_refused_though_all_sums_agree(of_two_ranks, tmp_path):
    """Shape and offset of a part: nothing that was not written is ever returned."""
    path = Path(shutil.copytree(of_two_ranks, tmp_path / "step_1"))
    for rank in (0, 1):
        name = f"model.{rank}.safetensors"
        content = (of_two_ranks / name).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        cut = json.loads(header["__metadata__"]["cut"])
        assert cut == {"w": [[6, 4], [0 if rank == 0 else 4, 0]]}
        refused = []
        for text in variants(cut):
            changed_header = json.dumps(changed(header, ("__metadata__", "cut"), text)).encode()
            reseal(path, name, len(changed_header).to_bytes(8, "little") + changed_header + content[8 + length :])
            refused.append(not loads_or_refuses(path))
        assert sum(refused) > 0.9 * len(refused) > 80
        reseal(path, name, content)
    assert loads_or_refuses(path)


@pytest.mark.faults
def test_a_part_beyond_the_whole_or_of_another_tensor_is_refused(of_two_ranks):
    with checkpoint.open_saved(of_two_ranks) as saved:
        empty = saved.read("model", "w", Shard(torch.zeros(0, 4), (6, 4), (6, 0)))
        assert empty.shape == (0, 4) and empty.dtype == torch.float32
        for shape, name in (((6, 5), "w"), ((6,), "w"), ((8, 4), "w"), ((6, 4), "v")):
            like = Shard(torch.zeros(shape), shape, (0,) * len(shape))
            with pytest.raises(CheckpointError, match=r"is \[6, 4\] in the checkpoint|has no v in model"):
                saved.read("model", name, like)


@pytest.mark.faults
def test_names_that_are_not_ours_are_left_alone(tmp_path):
    """Every later save and prune works, and nobody's folder is touched."""
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step in (1, 2):
        save(root, step, small(step), {})
    save(elsewhere, 9, small(9), {})
    odd = ["step_007", "step_", "step_-3", "step_1.5", "step_٣", "step_" + "9" * 200, "step_1_old", "Step_4"]
    for name in odd:
        (root / name).mkdir()
    (root / "step_8").write_text("a file")
    (root / "step_9").symlink_to(elsewhere / "step_9")
    (root / "step_10").symlink_to(tmp_path / "nowhere")
    assert list_steps(root) == [1, 2] and latest(root) == root / "step_2"
    set_aside_after(root, 2)
    tidy(root)
    save(root, 3, small(3), {})
    prune(root, 1)
    assert list_steps(root) == [3]
    assert {entry.name for entry in root.iterdir()} == {*odd, "step_3", "step_8", "step_9", "step_10"}
    assert load(elsewhere / "step_9")[0]["model"]["w"][0, 0] == 9


@pytest.mark.faults
def test_links_where_a_checkpoint_is_written_or_removed_are_not_followed(tmp_path):
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    save(elsewhere, 5, small(5), {})
    root.mkdir()
    for name in ("step_5", ".writing-step_6", ".replaced-step_7", "abandoned_step_8"):
        (root / name).symlink_to(elsewhere / "step_5")
    with pytest.raises(CheckpointError, match=r"\.writing-step_6: is a symbolic link"):
        begin(root, 6)
    for step in (5, 6, 8):  # a link of a checkpoint's name gives way to it
        save(root, step, small(step), {})
    set_aside_after(root, 7)
    assert list_steps(root) == [5, 6] and not list(root.glob(".writing*"))
    assert not (root / "step_5").is_symlink() and not (root / "abandoned_step_8").is_symlink()
    assert load(elsewhere / "step_5")[0]["model"]["w"][0, 0] == 5


LEFT = {"log.txt": "x", "config.yaml": "x", "completions.jsonl": '{"step": 1}\n', "bad_batch_step_1.json": "[]"}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("files", "is_free"),
    [
        ({".lock": ""}, True),
        ({".lock": "", "metrics.jsonl": "", **LEFT}, True),
        ({".lock": "", "metrics.jsonl": '{"step": 0, "eval/reward": 0.5}\n', "tensorboard/events": "x", **LEFT}, True),
        ({".lock": "", "metrics.jsonl": '{"step": 0, "a": 1}\n{"step": 1, "a": 1}\n', **LEFT}, False),
        ({".lock": "", "metrics.jsonl": "", "checkpoints/step_1/meta.json": "{}", **LEFT}, False),
        ({".lock": "", "metrics.jsonl": "", "checkpoints/.writing-step_1/model.safetensors": "half", **LEFT}, True),
        ({".lock": "", "metrics.jsonl": "", "notes.txt": "mine", "plot.png": "x", **LEFT}, True),
        ({"metrics.jsonl": "", **LEFT}, False),  # somebody's folder: no run of ours took it
    ],
)
def test_a_run_that_finished_no_step_does_not_block_the_next(tmp_path, files, is_free):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with nullcontext() if is_free else pytest.raises(ConfigError, match="not empty; go on with that run"):
        open_run_dir(tmp_path, resume=False).close()
    assert (tmp_path / "config.yaml").exists() == ("config.yaml" in files)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["checkpoints", "eval", "tensorboard", "wandb"])
def test_a_folder_of_a_run_that_is_a_symbolic_link_is_refused(tmp_path, name):
    """A run would delete old checkpoints through it. The run folder itself may be a link."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    open_run_dir(tmp_path / "run", resume=False).close()
    (tmp_path / "run" / name).symlink_to(tmp_path)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=rf"run_dir=.*run: {name} is a symbolic link, .*; remove it"):
            open_run_dir(tmp_path / "run", resume)
    with pytest.raises(ConfigError, match=f"{name} is a symbolic link"):
        own_folder(Config(run_dir=str(tmp_path / "run")), 1)


@pytest.mark.faults
def test_a_lock_that_is_a_symbolic_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"run_dir=.*: cannot be used \(.*symbolic links: .*\.lock"):
        open_run_dir(tmp_path / "run", resume=False)
    assert (tmp_path / "victim").read_text() == "precious"
