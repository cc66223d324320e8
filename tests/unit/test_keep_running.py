"""The shell loop that ends a run: what it starts again, and when it gives up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

LOOP = Path(__file__).resolve().parents[2] / "scripts" / "keep_running.sh"
# In the place of pgrpo: the n-th call exits with the n-th code (the last one for ever), `+` before it: with a new checkpoint.
FAKE = """\
#!/bin/bash
echo "$@" >> calls
n=$(wc -l < calls)
read -ra codes <<< "$CODES"
code=${codes[n - 1]:-${codes[-1]}}
[ "${code:0:1}" != + ] || mkdir -p run/checkpoints/step_$((n * 7))
exit "${code#+}"
"""


def keep_running(folder: Path, codes: str, tries: int = 3) -> tuple[int, list[str], str]:
    fake = folder / "fake"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    environment = os.environ | {"PGRPO": str(fake), "CODES": codes, "TRIES": str(tries)}
    command = [str(LOOP), "run", "--config", "c.yaml", "a=b c"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, (folder / "calls").read_text().splitlines(), done.stderr


@pytest.mark.parametrize(
    ("codes", "code", "calls"),
    [
        ("0", 0, 1),
        ("1 143 137 0", 1, 3),  # three failures without a checkpoint
        ("1 137 0", 0, 3),
        ("+1 1 1 +143 1 +1 1 0", 0, 8),  # a new checkpoint each time before the third
        ("+1 1 1 1 0", 1, 4),
        ("1 2 0", 2, 2),  # wrong input
        ("1 130 0", 130, 2),  # Ctrl-C
    ],
)
def test_starts_again_until_there_is_no_use(tmp_path, codes, code, calls):
    got, made, said = keep_running(tmp_path, codes)
    assert (got, len(made)) == (code, calls), said
    assert made[-1] == "train --config c.yaml a=b c run_dir=run --resume auto"
    assert said.count("keep_running: exit code ") == calls - (code in (0, 2, 130))


def test_ends_after_ctrl_c_whatever_the_launcher_exits_with(tmp_path):
    """torchrun exits with 1 after Ctrl-C, once its ranks have saved."""
    fake = tmp_path / "fake"
    fake.write_text(
        "#!/bin/bash\ntrap 'mkdir -p run/checkpoints/step_7; exit 1' INT\necho call >> calls\nsleep 30 & wait\n"
    )
    fake.chmod(0o755)
    environment = os.environ | {"PGRPO": str(fake)}
    loop = subprocess.Popen([str(LOOP), "run"], cwd=tmp_path, env=environment, start_new_session=True)
    deadline = time.monotonic() + 20
    while not (tmp_path / "calls").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(loop.pid, signal.SIGINT)
    try:
        assert loop.wait(timeout=20) == 130
    finally:
        if loop.poll() is None:
            os.killpg(loop.pid, signal.SIGKILL)
    assert (tmp_path / "calls").read_text() == "call\n"
    assert (tmp_path / "run" / "checkpoints" / "step_7").is_dir()


def test_says_what_it_saw(tmp_path):
    _, _, said = keep_running(tmp_path, "1 +143 0")
    assert said == (
        "keep_running: exit code 1, newest checkpoint none, failures without a new one: 1 of 3\n"
        "keep_running: exit code 143, newest checkpoint step_14, failures without a new one: 0 of 3\n"
    )
