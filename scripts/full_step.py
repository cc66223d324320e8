"""Whole training steps, rollout included, of a model's shape with random weights (so that completions run to their limit).

    python scripts/full_step.py --shape-of benchmarks/qwen3_4b --config qwen3_4b.yaml --prompts 32 --prompt 4096 \
        --completion 1024 --group-size 8 [--steps 3] [--json FILE] [key=value ...]

Makes a model folder beside the run folder, from config.json alone, trains on random prompts, and prints the median of each part
of a step. The first step, which compiles, is left out. ``model.attention=repeated`` in another run gives the other side.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import statistics
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import pgrpo
from pgrpo.config import load_config
from pgrpo.distributed import start
from pgrpo.rollout.base import sample_seeds
from pgrpo.rollout.vllm import VLLMEngine
from pgrpo.training.run import build_run
from pgrpo.training.sample import sampling_params

WORDS = [f"w{i}" for i in range(1000)]
PARTS = (
    "time/weight_sync",
    "time/rollout",
    "time/sleep",
    "time/reward",
    "time/old_logprobs",
    "time/update",
    "time/step",
)
OTHERS = (
    "perf/peak_memory_gib",
    "perf/tokens_per_s",
    "perf/mfu",
    "tokens/packed",
    "tokens/repeated",
    "completions/mean_length",
)


def make_model(shape_of: Path, folder: Path) -> None:
    """Random weights in bfloat16, and a tokenizer that makes one token of each word."""
    config = AutoConfig.from_pretrained(shape_of)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 0, 0  # the tokenizer's, below
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    vocab = {"<end>": 0} | {word: i + 1 for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{{ messages[0].content }}{{ '' if enable_thinking }}"  # a key of qwen3_4b.yaml's
    tokenizer.save_pretrained(folder)


def spread(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """Some number that differs within a group."""
    return [float(sum(ids) % 1000) for ids in completion_ids]


def settings(args: argparse.Namespace) -> tuple[list[str], list[dict[str, str]]]:
    """Overrides of the config, and the rows of random words; the model folder is made if it is not there."""
    model = args.run_dir.with_name(args.run_dir.name + "_model")
    if not model.exists():
        make_model(args.shape_of, model)
    rnd = random.Random(0)
    rows = [{"text": " ".join(rnd.choices(WORDS, k=args.prompt))} for _ in range(args.prompts * (args.steps + 1))]
    keys = {
        "model.path": model, "run_dir": args.run_dir,
        "rollout.prompts_per_step": args.prompts, "rollout.group_size": args.group_size,
        "rollout.max_completion_tokens": args.completion, "data.max_prompt_tokens": args.prompt, "train.steps": args.steps + 1,
        "train.token_budget": args.prompt + args.group_size * args.completion, "eval.every": 0, "checkpoint.every": 0,
        "prompt.messages": "[{role: user, content: '{text}'}]", "rewards.functions": "[]",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in keys.items()] + args.overrides, rows


def steps(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step's parts."""
    overrides, rows = settings(args)
    shutil.rmtree(args.run_dir, ignore_errors=True)
    pgrpo.train(args.config, overrides, rewards=[spread], dataset=rows)
    lines = [json.loads(line) for line in (args.run_dir / "metrics.jsonl").read_text().splitlines()][1:]
    return {name: statistics.median(line[name] for line in lines) for name in (*PARTS, *OTHERS) if name in lines[0]}


def rollouts(args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of vLLM: as a run calls it, and as it is without log-probs. In turn, on other prompts each time."""
    overrides, rows = settings(args)
    config = load_config(args.config, overrides, rewards_from_python=True, data_from_python=True)
    rates: dict[str, list[float]] = {"rollout_tokens_per_s": [], "plain_vllm_tokens_per_s": []}
    with start(config.model.fsdp_size) as world, build_run(config, world, [spread], rows) as run, run.engine.awake():
        assert isinstance(run.engine, VLLMEngine), "rollout.engine must be vllm"
        vllm = importlib.import_module("vllm")
        plain = vllm.SamplingParams(n=args.group_size, max_tokens=args.completion)
        for step in range(args.steps + 1):
            prompts = run.stream.take(args.prompts)
            seeds = [sample_seeds(0, step, i, group_size=args.group_size) for i in range(len(prompts))]
            started = time.perf_counter()
            groups = run.engine.generate(prompts, sampling_params(config), seeds)
            tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
            rates["rollout_tokens_per_s"].append(tokens / (time.perf_counter() - started))
            run.engine.llm.reset_prefix_cache()
            started = time.perf_counter()
            outputs = run.engine.llm.generate(
                [{"prompt_token_ids": p.token_ids} for p in prompts], plain, use_tqdm=False
            )
            tokens = sum(len(c.token_ids) for o in outputs for c in o.outputs)
            rates["plain_vllm_tokens_per_s"].append(tokens / (time.perf_counter() - started))
            run.engine.llm.reset_prefix_cache()
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--shape-of", type=Path, required=True, help="folder with a config.json")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/full_step"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--completion", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--rollouts", action="store_true", help="vLLM's tokens a second alone, with log-probs and without"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the row is added to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("prompts", "prompt", "completion", "group_size")}
    row = shape | {"overrides": args.overrides} | (rollouts if args.rollouts else steps)(args)
    print(json.dumps(row, indent=1))
    if args.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        report = json.loads(args.json.read_text()) if args.json.exists() else {"device": device, "rows": []}
        report["rows"].append(row)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
