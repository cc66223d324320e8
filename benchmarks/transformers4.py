"""Reads exports with transformers 4, as servers that carry it do: RoPE, log-probs and tokenizer are those of transformers 5.

    python benchmarks/transformers4.py --python-v4 VENV/bin/python [--out FILE]

VENV has torch and transformers==4.57.*; ``make release-checks`` makes it.

For each case it writes a model, trains it for a step on the CPU, exports it, and compares log-probs of the export in float64 in
both versions. One case reads what ``save_pretrained`` of transformers 5 wrote instead, and must differ: the comparison can fail.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT = 1e-9
"""Nats. Both versions compute in float64; in float32 parts, such as RoPE's angles, they compute alike."""
TEXT = "12+34=46"
READER = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
result = {"transformers": transformers.__version__}
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float64).eval()
rope = model.model.rotary_emb
inv = rope.inv_freq.double()
result["inv_freq"] = [inv[0].item(), inv[len(inv) // 2].item(), inv[-1].item()]
try:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result["ids"] = tokenizer(text)["input_ids"]
    result["chat"] = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
except Exception as error:
    result["tokenizer"] = f"{type(error).__name__}: {error}"[:200]
ids = torch.arange(200).remainder(model.config.vocab_size)[None]
with torch.no_grad():
    logprobs = model(ids).logits.double().log_softmax(-1)
result["logprobs"] = logprobs[0, range(199), ids[0, 1:]].tolist()
print(json.dumps(result))
"""


def cases() -> dict[str, dict[str, Any]]:
    """Name -> configs of transformers, whose RoPE the versions write in different forms."""
    sizes = {
        "vocab_size": 16, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    return {
        "Qwen3, rope_theta 1e6": sizes | {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
        "Qwen2, tied": sizes | {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
        "Llama, llama3 scaling": sizes | {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": llama3},
        "Llama, linear scaling": sizes
        | {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    }


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A random model whose config.json and tokenizer are in the form that transformers 4 writes, as those on the hub are."""
    import runpy

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "make_tiny_model.py"))
    tokenizer = script["make_tokenizer"]()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    old = {"architectures": [], "torch_dtype": "float32"} | config | {"vocab_size": max(16, vocabulary)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(old))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 8  # attention that depends on positions
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    old["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(old, indent=2))
    written = json.loads((folder / "tokenizer_config.json").read_text())
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        written.pop(key, None)
    written["chat_template"] = tokenizer.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(written, indent=2))


def read(python: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run([python, "-c", READER, str(folder), TEXT], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def compare(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What differs between the readings of one folder."""
    if "error" in old or "error" in new:
        return {"is_equal": False, "error": old.get("error") or new.get("error")}
    nats = max(abs(a - b) for a, b in zip(old["logprobs"], new["logprobs"], strict=True))
    rope = max(abs(a / b - 1) for a, b in zip(old["inv_freq"], new["inv_freq"], strict=True))
    same = all(old.get(key) == new.get(key) for key in ("ids", "chat")) and "ids" in old
    out: dict[str, Any] = {
        "is_equal": nats < LIMIT and rope < 1e-6 and same,
        "nats": nats,
        "rope": rope,
        "tokenizer": same,
    }
    return out | ({"tokenizer_error": old["tokenizer"]} if "tokenizer" in old else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python-v4", required=True, help="a Python with transformers 4")
    parser.add_argument("--out", type=Path, help="write results as JSON")
    args = parser.parse_args()
    import pgrpo

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        for i, (case, config) in enumerate(cases().items()):
            source = tmp / f"model{i}"
            write_model(source, config)
            for lora in (0, 4) if i == 0 else (0,):
                run, out = tmp / f"run{i}_{lora}", tmp / f"out{i}_{lora}"
                keys = [
                    f"model.path={source}", f"run_dir={run}", "eval.every=0", "train.steps=1", "rollout.prompts_per_step=4",
                    "rollout.group_size=4", f"model.lora_rank={lora}", "optim.lr=0.01", "rollout.engine=embedded",
                    "rewards.functions=[{function: format_regex, args: {pattern: '.*1.*'}}]", "model.dtype=float32",
                ]  # fmt: skip
                pgrpo.train("quickstart", keys)
                pgrpo.export(run, out)
                new = read(sys.executable, out)
                old = read(args.python_v4, out)
                results[case + (", LoRA merged" if lora else "")] = compare(old, new)
                if i == 0 and not lora:  # as transformers 5 writes it
                    again = tmp / "as_v5"
                    resave(out, again)
                    results[f"{case}, as transformers 5 saves it"] = compare(read(args.python_v4, again), new)
                versions = {"transformers": [old.get("transformers"), new.get("transformers")]}
    for case, result in results.items():
        print(f"{case}: {json.dumps(result)}")
    expected = {case: "saves it" not in case for case in results}
    wrong = [case for case, result in results.items() if result["is_equal"] != expected[case]]
    if args.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        about = {"commit": commit.stdout.strip(), "python": platform.python_version()} | versions
        args.out.write_text(json.dumps(about | {"limit_nats": LIMIT, "results": results}, indent=1) + "\n")
    sys.exit(f"not as expected: {', '.join(wrong)}" if wrong else 0)


def resave(folder: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


if __name__ == "__main__":
    main()
