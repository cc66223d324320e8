"""benchmarks/start_time.py without a run, which only `make test-slow` does."""

import importlib

import pytest
import start_time


@pytest.mark.parametrize(("module", "name"), [one[:2] for one in start_time.TIMED])
def test_what_is_timed_of_a_start_is_there(module, name):
    assert callable(getattr(importlib.import_module(module), name))
