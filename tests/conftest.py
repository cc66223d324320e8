"""Fixtures that several test files share."""

import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The quick start's model without its warm start."""
    script = runpy.run_path(str(ROOT / "scripts" / "make_tiny_model.py"))
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    script["make_model"]().save_pretrained(folder)
    script["make_tokenizer"]().save_pretrained(folder)
    return folder
