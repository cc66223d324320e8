"""A model that vLLM builds of transformers' classes does not change these."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, Olmo2Config, Olmo2Model, PreTrainedModel

from pgrpo.rollout.vllm.own_classes import own_classes

FAKES = str(Path(__file__).parents[1] / "fakes")
CONFIG = Olmo2Config(
    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    pad_token_id=None,
)  # fmt: skip


@pytest.fixture
def decorators(monkeypatch):
    monkeypatch.syspath_prepend(FAKES)
    assert not any(name.partition(".")[0] == "vllm" for name in sys.modules)
    yield importlib.import_module("vllm.compilation.decorators")
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def as_at_a_start(decorators) -> PreTrainedModel:
    """The model that vLLM builds. Its code calls the decorator by way of a function that is imported beside it."""
    first = AutoModel.from_config(CONFIG)
    decorators._support_torch_compile(
        type(first.get_decoder()), {"input_ids": 1}, enable_if=lambda config: config != "one"
    )
    decorators.config = "one"
    try:
        return AutoModel.from_config(CONFIG)
    finally:
        decorators.config = None


def test_the_policys_class_is_as_before(decorators):
    policy = AutoModel.from_config(CONFIG)
    attributes, bases, ids = dict(vars(Olmo2Model)), Olmo2Model.__bases__, torch.tensor([[1, 2, 3]])
    wanted = policy(ids).last_hidden_state
    for _ in range(2):  # a process may start a second engine
        with own_classes():
            vllms = as_at_a_start(decorators)
        assert dict(vars(Olmo2Model)) == attributes and Olmo2Model.__bases__ == bases
        assert torch.equal(policy(ids).last_hidden_state, wanted) and type(policy) is Olmo2Model
        assert type(AutoModel.from_config(CONFIG)) is Olmo2Model
        assert isinstance(vllms, decorators.Compiled) and isinstance(vllms, Olmo2Model)
        assert str(type(vllms)) == str(Olmo2Model), "by which transformers finds what it keeps for a class"
        vllms.load_state_dict(policy.state_dict())
        assert vllms.do_not_compile and torch.equal(vllms(ids).last_hidden_state, wanted)


def test_a_start_that_fails_leaves_the_class_too(decorators):
    attributes, bases = dict(vars(Olmo2Model)), Olmo2Model.__bases__
    with pytest.raises(ZeroDivisionError), own_classes():
        assert 1 / (type(as_at_a_start(decorators)) is Olmo2Model)
    assert dict(vars(Olmo2Model)) == attributes and Olmo2Model.__bases__ == bases


def test_vllms_own_models_are_decorated_as_they_are(decorators):
    class Qwen3Model(torch.nn.Module):
        pass

    with own_classes():
        assert decorators._support_torch_compile(Qwen3Model) is Qwen3Model
    assert decorators.Compiled in Qwen3Model.__bases__
