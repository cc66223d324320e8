"""A run says what vLLM builds of its model, and refuses a model that it does not build before anything is loaded."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pgrpo.config import Config, ConfigError, DataConfig, ModelConfig, RolloutConfig
from pgrpo.distributed.world import World
from pgrpo.rollout.vllm import builds
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.training.engine import check_built

CONFIG = Config(
    model=ModelConfig(path="a_model"),
    data=DataConfig(max_prompt_tokens=8),
    rollout=RolloutConfig(max_completion_tokens=8),
)
BY_TRANSFORMERS = "vLLM has no code for SomeForCausalLM and runs transformers' own (its Transformers backend)"
GPU = torch.device("cuda", 0)


@pytest.fixture
def asks(monkeypatch):
    """``asks(model_type)``: what a run says of what vLLM builds, where vLLM answers so."""

    def ask(model_type: str, by_transformers=False, error: str | None = None, device=GPU) -> str:
        def create_model_config() -> Any:
            torch.manual_seed(0)  # as vLLM does
            if error is not None:
                raise ValueError(error)
            return SimpleNamespace(
                architectures=["SomeForCausalLM"], using_transformers_backend=lambda: by_transformers
            )

        package = SimpleNamespace(
            EngineArgs=lambda **_: SimpleNamespace(create_model_config=create_model_config), __version__="0.26.0"
        )
        monkeypatch.setattr(builds, "package", lambda: package)
        monkeypatch.setattr(builds, "inspect_model_here", lambda: None)
        monkeypatch.setattr(vllm_start, "is_installed", lambda: True)
        state, hf_config = torch.get_rng_state(), SimpleNamespace(model_type=model_type)
        try:
            return check_built(CONFIG, hf_config, World(0, 1, device))  # pyright: ignore[reportArgumentType]
        finally:
            assert torch.equal(torch.get_rng_state(), state)

    return ask


def test_a_run_says_whose_code_samples(asks):
    assert asks("granite") == "vLLM has code for SomeForCausalLM"
    assert asks("granite", by_transformers=True) == BY_TRANSFORMERS
    assert asks("jetmoe") == "vLLM has code for SomeForCausalLM", "a release that has"
    assert asks("granite", error="not asked", device=torch.device("cpu")) == ""


@pytest.mark.parametrize("model_type", builds.WRONG_BY_TRANSFORMERS)
def test_what_is_known_to_be_wrong_is_refused(asks, model_type):
    why = builds.WRONG_BY_TRANSFORMERS[model_type]
    message = f"rollout.engine=auto: vLLM 0.26.0 cannot sample from a_model: {BY_TRANSFORMERS}, where {why}; set rollout.engine="
    with pytest.raises(ConfigError, match=re.escape(message) + "embedded$"):
        asks(model_type, by_transformers=True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "1 validation error for ModelConfig\n  Value error, Model architectures ['A'] are not supported for now. Supported "
            "architectures: dict_keys(['B']) [type=value_error, input_value=ArgsKwargs((), {})]\n    For more",
            "Model architectures ['A'] are not supported for now",
        ),
        ("1 validation error\n  Value error, too long [type=value_error, input_value=1]", "too long"),
        ("no such file.", "no such file"),
        ("", "ValueError"),
    ],
)
def test_a_model_that_vllm_does_not_build_is_refused(asks, error, reason):
    message = f"rollout.engine=auto: vLLM 0.26.0 cannot sample from a_model: {reason}; set rollout.engine=embedded"
    with pytest.raises(ConfigError, match=re.escape(message) + "$"):
        asks("granite", error=error)
