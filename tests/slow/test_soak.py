"""A short soak; ``python benchmarks/soak.py`` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"sigkill", "sigterm", "reward_raise", "reward_hang", "nan_loss", "nan_gradient", "full_disk"}


@pytest.mark.timeout(600)  # three minutes on an idle core
@pytest.mark.slow
@pytest.mark.faults
def test_soak(tmp_path):
    """Each kind of fault once, in a run that they stop and in one whose data they change."""
    command = [sys.executable, "benchmarks/soak.py", "--steps", "60", "--json", str(tmp_path / "soak.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "soak.json").read_text())
    stopped, changed = summary["stopped"], summary["changed"]
    print({name: stopped[name] for name in ("faults_total", "resumes", "exit_codes", "resumed_at_steps")})
    assert stopped["bit_equal_to_undisturbed"]
    assert summary["differences"] == []
    for run in (stopped, changed):
        assert run["finished"]
        assert run["faults"] == dict.fromkeys(sorted(KINDS), 1)
    assert stopped["resumes"] >= len(KINDS)  # each of them ends the process
    assert changed["resumes"] >= 3  # kill, SIGTERM, full disk
    assert summary["undisturbed"]["resumes"] == 0
