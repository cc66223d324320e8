from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from pgrpo import checkpoint
from pgrpo.checkpoint import CheckpointError
from pgrpo.commands.export import build_model, export
from pgrpo.commands.source_files import copy_source_files, source_folder
from pgrpo.config import ConfigError, ModelConfig

VOCAB = {"<eos>": 0, "<pad>": 1, "a": 2, "b": 3, "c": 4}


def write_model(folder: Path, tied: bool, generation: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).float()
    if generation:
        model.generation_config.max_new_tokens = 77  # pyright: ignore[reportOptionalMemberAccess]
    model.save_pretrained(folder)
    if not generation:
        (folder / "generation_config.json").unlink()
    core = Tokenizer(models.WordLevel(VOCAB, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return model


def write_run(tmp_path: Path, tied: bool = True, generation: bool = True) -> tuple[Path, dict[int, LlamaForCausalLM]]:
    """A run with checkpoints of steps 1 and 2, and the models they hold."""
    run, trained = tmp_path / "run", {}
    for step in (1, 2):
        model = write_model(tmp_path / "initial", tied, generation)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * step * torch.randn_like(parameter)
        trained[step] = model.eval()
        tensors = {"model": dict(model.named_parameters()), "optimizer": {"m": torch.zeros(2)}}
        checkpoint.save(run / "checkpoints", step, tensors, {"step": step})
    (run / "config.yaml").write_text(
        f"model:\n  path: {tmp_path / 'initial'}\n  revision: null\n"
        "rewards:\n  functions:\n  - args: {key: (redacted)}\n"
    )
    return run, trained


def logits(model) -> torch.Tensor:
    return model.eval()(torch.arange(8).view(1, 8)).logits


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_from_pretrained_gives_equal_logits(tmp_path, tied):
    run, trained = write_run(tmp_path, tied)
    out = export(run, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32 and torch.equal(logits(loaded), logits(trained[2]))
    assert not torch.equal(logits(loaded), logits(LlamaForCausalLM.from_pretrained(tmp_path / "initial")))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert {name: p.shape for name, p in loaded.named_parameters()} == {
        name: p.shape for name, p in trained[2].named_parameters()
    }
    assert loaded.generation_config.max_new_tokens == 77
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("a c").input_ids == [2, 4] and tokenizer.eos_token == "<eos>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "b"
    assert list(tmp_path.glob(".writing*")) == []
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


@torch.no_grad()
def test_step_and_dtype(tmp_path, capsys):
    run, trained = write_run(tmp_path)
    (tmp_path / "out").mkdir()
    out = export(run, tmp_path / "out", step=1, dtype="bfloat16")
    assert capsys.readouterr().out.endswith(f"wrote {out}: the weights after step 1, bfloat16\n")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    source = json.loads((tmp_path / "initial" / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == source | {"dtype": "bfloat16"}
    assert torch.equal(logits(loaded), logits(trained[1].bfloat16()))
    # A tied weight is written once.
    assert set(load_file(out / "model.safetensors")) == {name for name, _ in trained[1].named_parameters()}


@torch.no_grad()
def test_tied_weight_under_its_other_name(tmp_path):
    run, trained = write_run(tmp_path)
    tensors, scalars = checkpoint.load(run / "checkpoints" / "step_2")
    tensors["model"]["lm_head.weight"] = tensors["model"].pop("model.embed_tokens.weight")
    checkpoint.save(run / "checkpoints", 3, tensors, scalars)
    loaded = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(trained[2]))


def test_without_generation_config(tmp_path):
    run, _ = write_run(tmp_path, generation=False)
    loaded = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out"))
    assert loaded.generation_config.eos_token_id == 0


def test_a_broken_checkpoint_falls_back(tmp_path, caplog):
    run, trained = write_run(tmp_path)
    file = run / "checkpoints" / "step_2" / "model.0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    loaded = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(trained[1])) and "step_2 is broken" in caplog.text
    with pytest.raises(CheckpointError, match=r"model\.0\.safetensors"):
        export(run, tmp_path / "other", step=2)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.pop("model.norm.weight"), r"Missing key.*model\.norm\.weight"),
        (lambda model: model.update(extra=torch.ones(2)), r"Unexpected key.*extra"),
        (lambda model: model.update({"model.norm.weight": torch.ones(3)}), r"size mismatch.*model\.norm\.weight"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, change, message):
    run, _ = write_run(tmp_path)
    tensors, scalars = checkpoint.load(run / "checkpoints" / "step_2")
    change(tensors["model"])
    checkpoint.save(run / "checkpoints", 3, tensors, scalars)
    with pytest.raises(CheckpointError, match=rf"step_3: this is not a checkpoint of the model .*initial: .*{message}"):
        export(run, tmp_path / "out")


def test_the_models_own_files_are_taken_over_and_only_the_precision_changes(tmp_path):
    """In the form of transformers 4, as on the hub, which transformers 5 would rewrite."""
    run, trained = write_run(tmp_path)
    source, out = tmp_path / "initial", tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    assert rope["rope_theta"] == 10000.0
    config |= {"rope_theta": 10000.0, "torch_dtype": "float16", "transformers_version": "4.51.0", "own_key": [1]}
    del config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    kept = {
        "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}',
        "merges.txt": "a b",
    }
    kept |= {
        "modeling_own.py": "x = 1",
        "LICENSE": "MIT",
        "chat_template.jinja": "{{ x }}",
        "generation_config.json": "{}",
    }
    kept |= {"additional_chat_templates/tool.jinja": "{{ y }}"}
    left = {
        "README.md": "theirs",
        "pytorch_model.bin": "",
        "model.safetensors.index.json": "{}",
        "training_args.bin": "",
    }
    left |= {"trainer_state.json": "{}", "onnx/config.json": "{}", ".hidden.json": "{}"}
    for name, text in (kept | left).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    export(run, out, dtype="bfloat16")
    for name, text in kept.items():
        assert (out / name).read_text() == text
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}
    found = {file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file()}
    assert found == {*kept, "tokenizer.json", "config.json", "model.safetensors", "README.md"}
    assert "theirs" not in (out / "README.md").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16 and torch.equal(logits(loaded), logits(trained[2].bfloat16()))


def test_the_precision_of_parts_is_changed_and_a_config_of_another_type_is_left(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    whole = {"model_type": "a", "text_config": {"dtype": "bfloat16", "n": 1}, "vision_config": {"n": 2}}
    (source / "config.json").write_text(json.dumps(whole))
    (out / "config.json").write_text('{"model_type": "text"}')
    copy_source_files(source, out, "float32", "text")
    assert json.loads((out / "config.json").read_text()) == {"model_type": "text"}
    copy_source_files(source, out, "float32", "a")
    parts = {"text_config": {"dtype": "float32", "n": 1}, "torch_dtype": "float32"}
    assert json.loads((out / "config.json").read_text()) == whole | parts


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert source_folder(ModelConfig("org/model", revision="v1")) == tmp_path
    ((names, settings),) = asked
    assert (names, settings["revision"]) == (("org/model",), "v1")
    patterns = settings["allow_patterns"]
    assert "*.json" in patterns and not any(fnmatch("model.safetensors", pattern) for pattern in patterns)

    def fails(*_, **__):
        raise FileNotFoundError("no network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(
        ConfigError, match=r"model\.path=org/model: its config and tokenizer cannot be copied: no network$"
    ):
        source_folder(ModelConfig("org/model"))


def test_the_model_card_names_base_data_rewards_config_and_curve(tmp_path):
    run, _ = write_run(tmp_path)
    rows = [{"step": 0, "eval/pass@1": 0.25}, *({"step": n, "reward": n / 8} for n in (1, 2, 3))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = (
        (run / "config.yaml").read_text().replace("functions:\n  - args", "functions:\n  - function: math\n    args")
    )
    (run / "config.yaml").write_text(
        f"{config}data:\n  path: openai/gsm8k\nprompt:\n  messages: [{{role: system, content: /no_think}}]\n"
    )
    card = (export(run, tmp_path / "my_model") / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (
        front["datasets"] == ["openai/gsm8k"] and front["library_name"] == "transformers" and "base_model" not in front
    )
    for text in ("# my_model", "after step 2.", "- Base model: `initial`", "- Data: `openai/gsm8k`",
                 "- Rewards: `math`", "key: (redacted)", "| reward | 0.125 (step 1) | 0.25 (step 2) |",
                 "| eval/pass@1 | 0.25 (step 0) | 0.25 (step 0) |", "![reward](curve.png)"):  # fmt: skip
        assert text in card
    assert str(tmp_path) not in card and "content: /no_think" in card
    assert (tmp_path / "my_model" / "curve.png").read_bytes().startswith(b"\x89PNG")
    (run / "metrics.jsonl").unlink()
    out = export(run, tmp_path / "without_steps")
    assert not (out / "curve.png").exists() and "Curve" not in (out / "README.md").read_text()


def test_clear_errors(tmp_path):
    run, _ = write_run(tmp_path)
    with pytest.raises(ConfigError, match=r"step_7; .*: 1, 2$"):
        export(run, tmp_path / "out", step=7)
    with pytest.raises(ConfigError, match=r"nowhere: not a run folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    for used in (run, run / "config.yaml"):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            export(run, used)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "empty" / "config.yaml").write_text((run / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="there is no readable checkpoint"):
        export(tmp_path / "empty", tmp_path / "out")
    (run / "config.yaml").write_text("model:\n  path: /no/such/model\n")
    with pytest.raises(ConfigError, match=r"model\.path=/no/such/model: cannot load"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_nothing_trains_comes_from_the_initial_model(tmp_path):
    """The correction of a router's scores is a buffer, which a checkpoint does not hold."""
    config = AutoConfig.for_model(
        "deepseek_v3", vocab_size=30, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, pad_token_id=0,
    )  # fmt: skip
    initial = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(initial.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias"))
    initial.save_pretrained(tmp_path)
    trained = {name: p.detach() + 1 for name, p in initial.named_parameters()}
    built = build_model(ModelConfig(path=str(tmp_path)), trained, tmp_path)
    wanted = initial.state_dict() | trained
    assert all(torch.equal(x, wanted[name]) for name, x in built.state_dict().items())
