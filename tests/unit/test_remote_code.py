"""Code in a model's folder where transformers has a class for the model too: which of both is proven and trained, and that the
folder's does not run unless that was allowed."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pgrpo.admission import models as admission
from pgrpo.admission.models import check_model
from pgrpo.commands.export import _initial
from pgrpo.config import ConfigError, ModelConfig
from pgrpo.model.policy import load_model
from pgrpo.planning import hub
from pgrpo.planning.flops import ModelDims
from pgrpo.planning.hub import code_folder, load_hf_config, new_model

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CODE = """
from transformers import LlamaForCausalLM

open({ran!r}, "w")


class OwnLlama(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits * {factor}
        return output
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a Llama whose folder has a class too. It returns the folder, and a file that is there once its code has run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(admission, "_proven", {})

    def written(name: str, factor: str = "1", **values) -> tuple[Path, Path]:
        folder, ran = tmp_path / name, tmp_path / f"{name}_ran"
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config |= {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnLlama"}, **values}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_own.py").write_text(CODE.format(ran=str(ran), factor=factor))
        return folder, ran

    return written


MAP = {"AutoModelForCausalLM": "modeling_own.OwnLlama"}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"attribute_map": {"auto_map": "other"}, "other": MAP},
        {"other": MAP, "attribute_map": {"other": "auto_map"}},
    ],
    ids=["auto_map", "renamed", "renamed late"],
)
def test_a_folders_code_does_not_run_unless_that_was_allowed(write, values):
    """The proof refuses the folder's class, whose logits depend on lengths; that of transformers is exact."""
    folder, ran = write("not_allowed", "input_ids.shape[1]", **values)
    model = ModelConfig(path=str(folder))
    config = load_hf_config(model)
    assert not check_model(str(folder), config, 100).refusal
    assert code_folder(config) is None and type(new_model(config, "eager")) is LlamaForCausalLM
    for loaded in (load_model(model), _initial(model)):
        assert type(loaded) is LlamaForCausalLM and code_folder(loaded.config) is None
        assert ModelDims.from_config(loaded.config).layers == 2
    config_json = json.loads((folder / "config.json").read_text())
    assert ModelDims.from_config({**config_json, "_name_or_path": str(folder)}).layers == 2
    assert not ran.exists()


def test_a_config_in_a_config_names_no_code_either():
    config = AutoConfig.for_model("llava_next", text_config={"model_type": "llama", "auto_map": MAP}, auto_map=MAP)
    assert config.get_text_config().auto_map == MAP
    assert hub.without_code(config) is config
    assert not hasattr(config, "auto_map") and not hasattr(config.get_text_config(), "auto_map")


def test_what_is_proven_is_what_is_loaded_where_its_code_may_run(write):
    folder, ran = write("allowed", "1.5")
    model = ModelConfig(path=str(folder), trust_remote_code=True)
    config = load_hf_config(model)
    assert not check_model(str(folder), config, 100).refusal and ran.exists()
    loaded, made = load_model(model), new_model(config, "eager")
    assert (
        type(loaded).__name__ == type(made).__name__ == "OwnLlama" and type(made).__module__ == type(loaded).__module__
    )
    code = code_folder(config)
    assert code is not None and code == code_folder(loaded.config) and (code / "modeling_own.py").exists()
    folder, _ = write("allowed_and_wrong", "input_ids.shape[1]")
    config = load_hf_config(ModelConfig(path=str(folder), trust_remote_code=True))
    with pytest.raises(ConfigError, match="hidden states are equal"):
        check_model(str(folder), config, 100)


def test_a_class_that_a_package_registered_is_proven_as_from_pretrained_picks_it(write, monkeypatch):
    class PackageConfig(LlamaConfig):
        model_type = "of_a_package"

    class PackageModel(LlamaForCausalLM):
        config_class = PackageConfig

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "of_a_package", PackageConfig)
    monkeypatch.setitem(AutoModelForCausalLM._model_mapping._extra_content, PackageConfig, PackageModel)
    folder, ran = write("registered", model_type="of_a_package")
    model = ModelConfig(path=str(folder), trust_remote_code=True)
    config = load_hf_config(model)
    assert type(new_model(config, "eager")) is type(load_model(model)) is PackageModel
    assert code_folder(config) == Path(__file__).parent and not ran.exists()
