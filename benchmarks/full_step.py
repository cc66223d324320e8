"""Times complete training steps, rollout included, of a model's shape with random weights (so that completions run to their limit).

    python benchmarks/full_step.py --shape-of benchmarks/qwen3_4b --config qwen3_4b.yaml --prompts 32 --prompt 4096 \
        --completion 1024 --group-size 8 [--attention grouped repeated] [--steps 2] [--plain] [--json FILE] [key=value ...]
    torchrun --nproc-per-node 2 benchmarks/full_step.py ... optim.offload=none

    python benchmarks/full_step.py --shape-of benchmarks/qwen3_vl_4b --config qwen3_4b.yaml --images 2 --prompt 200 \
        --completion 300 ... train.token_budget=49152

Creates a model folder beside the run folder from config.json alone, trains on random prompts, and prints the median time of each
part of a step, for grouped and repeated prompts in turn. A small step of each runs first, to compile, and is not counted; its
prompts have ``--warm-up-prompt`` tokens. MFU divides by the rate of a matrix product that is timed behind each step, while vLLM
does nothing. ``--images`` puts as many square images of noise into each prompt, of ``--image-tokens`` tokens each, in front of its
``--prompt`` tokens of text; no image occurs twice. It needs Pillow, and with vLLM torchvision.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import rows
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from pgrpo.commands.bench import _matmul_flops as matmul_flops
from pgrpo.config import Config, load_config
from pgrpo.distributed.world import start
from pgrpo.grpo import grpo_step
from pgrpo.planning.flops import GIB, mfu
from pgrpo.process.caches import use_caches
from pgrpo.rollout.vllm import start as vllm_start
from pgrpo.rollout.vllm.engine import VLLMEngine
from pgrpo.rollout.vllm.images import as_prompt
from pgrpo.training.build import Parts, build
from pgrpo.training.caller import Given
from pgrpo.training.progress import Progress
from pgrpo.types import Request
from pgrpo.vision.families import auto_class

WARM_UP_PROMPTS = 4
WORDS = [f"w{i}" for i in range(1000)]
MARKS = {name: f"<|{name}|>" for name in ("vision_start", "vision_end")} | {
    name: f"<|{name}_pad|>" for name in ("image", "video")
}
"""By the names of Qwen-VL's processors, which vLLM asks for the ids of these words."""
TEMPLATE = """\
{%- if messages[0].content is string %}{{ messages[0].content }}{% else %}{% for part in messages[0].content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}{{ '' if enable_thinking }}"""
"""``enable_thinking`` is a key of qwen3_4b.yaml's."""
PUBLISHED = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}
"""Types of language models that are published inside a model with a vision tower: vLLM 0.26 knows no other layout. The tower is one
small layer, which nothing reads."""
TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4}
PARTS = (
    "time/wake",
    "time/weight_sync",
    "time/rollout",
    "time/sleep",
    "time/offload",
    "time/reward",
    "time/old_logprobs",
    "time/update",
    "time/step",
)
PLAIN = {"plain_vllm_tokens_per_s": True, "plain_vllm_without_text_tokens_per_s": False}
"""What ``--plain`` measures: vLLM as it is, and without turning ids into text, as the trainer uses it."""
OTHERS = (
    "rollout/preemptions",
    "perf/peak_memory_gib",
    "perf/tokens_per_s",
    "perf/mfu",
    "perf/flops",
    "tokens/packed",
    "tokens/repeated",
    "completions/mean_length",
    "canary/slope",
    "canary/slope_error",
    "canary/logp_difference",
)


def make_model(shape_of: Path, folder: Path, layers: int | None = None) -> None:
    """Random weights in bfloat16, and a tokenizer that makes one token of each word. ``layers``: only so many."""
    config = AutoConfig.from_pretrained(shape_of)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    vocab = {word: i for i, word in enumerate(["<end>", *MARKS.values(), *WORDS])}
    for part in (config, config.get_text_config()):
        part.bos_token_id, part.eos_token_id, part.pad_token_id = None, 0, 0
    has_images = getattr(config, "vision_config", None) is not None
    if has_images:
        for name, mark in MARKS.items():
            setattr(config, f"{name}_token_id", vocab[mark])
        shutil.copytree(shape_of, folder, ignore=lambda _, names: {*names} - {"preprocessor_config.json"})
    make = auto_class(config)
    if whole := PUBLISHED.get(config.model_type):
        tower, tied = TOWER | {"out_hidden_size": config.hidden_size}, config.tie_word_embeddings
        parts = {"text_config": config.to_dict(), "vision_config": tower}
        config = AutoConfig.for_model(whole, **parts, tie_word_embeddings=tied, eos_token_id=0, pad_token_id=0)
        make = AutoModelForImageTextToText
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = make.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # vLLM looks at how much is free
    core = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # For some types of models transformers loads a class of its own, which splits text otherwise, but keeps added tokens.
    core.add_tokens([AddedToken(word, lstrip=True, normalized=False) for word in WORDS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<end>",
        extra_special_tokens=list(MARKS.values()) if has_images else [], chat_template=TEMPLATE,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


def noise(args: argparse.Namespace, rnd: random.Random) -> Any:
    """A square image that the model's image processor leaves as large as it is."""
    from PIL import Image

    sizes = json.loads((args.shape_of / "preprocessor_config.json").read_text())
    side = round(args.image_tokens**0.5) * sizes["patch_size"] * sizes["merge_size"]
    return Image.frombytes("RGB", (side, side), rnd.randbytes(3 * side * side))


def spread(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
    """Some number that differs within a group."""
    return [float(sum(ids) % 1000) for ids in completion_ids]


def model_folder(args: argparse.Namespace) -> Path:
    return args.run_dir.with_name(args.run_dir.name + "_model")


def clear_up(args: argparse.Namespace, config: Config) -> None:
    """Remove an old run folder, and make the model's if it is not there."""
    use_caches(
        config.cache_dir
    )  # before a model's file is imported, and what it imports: some look for their folders only then
    shutil.rmtree(args.run_dir, ignore_errors=True)
    if not (folder := model_folder(args)).exists():
        make_model(args.shape_of, folder, getattr(args, "layers", None))


def settings(args: argparse.Namespace) -> tuple[Config, list[dict[str, str]]]:
    """The config, and rows of random words."""
    rnd = random.Random(0)
    count, prompt = args.prompts * (args.steps + 1) * 3, args.prompt + args.images * (args.image_tokens + 2)
    if args.images:  # which take time: as many as there are steps for
        count = len(args.attention) * (WARM_UP_PROMPTS + args.prompts * args.steps) + args.plain * 2 * args.prompts
    short = len(args.attention) * min(args.prompts, WARM_UP_PROMPTS) if args.warm_up_prompt else 0
    lengths = [args.warm_up_prompt or args.prompt] * short + [args.prompt] * count
    data: list[dict[str, Any]] = [{"text": " ".join(rnd.choices(WORDS, k=length))} for length in lengths]
    for row in data if args.images else ():
        row["images"] = [noise(args, rnd) for _ in range(args.images)]
    keys = {
        "model.path": model_folder(args), "run_dir": args.run_dir,
        "rollout.prompts_per_step": args.prompts, "rollout.group_size": args.group_size,
        "rollout.max_completion_tokens": args.completion, "data.max_prompt_tokens": prompt,
        "train.token_budget": prompt + args.group_size * args.completion, "eval.every": 0, "checkpoint.every": 0,
        "prompt.messages": "[{role: user, content: '{text}'}]", "rewards.functions": "[]", "data.shuffle": False,
    }  # fmt: skip
    if args.images:
        keys |= {"prompt.images_column": "images"}
    overrides = [f"{key}={value}" for key, value in keys.items()] + args.overrides
    return load_config(args.config, overrides, rewards_from_python=True, data_from_python=True), data


def steps(args: argparse.Namespace, report: Callable[[list[dict[str, Any]]], None]) -> None:
    """Median seconds of a step's parts, a row for each way of attention; the first rank ``report``s the rows after every step."""
    config, data = settings(args)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in args.attention}
    plain: dict[str, list[float]] = {}
    with ExitStack() as stack:
        world = stack.enter_context(start(config.model.fsdp_size, config.model.sequence_parallel_size))
        world.together(lambda: clear_up(args, config) if world.is_main else None)
        parts, progress = stack.enter_context(build(config, world, Given([spread], data))), Progress()
        print(*parts.engine.notes, sep="\n", flush=True)
        for turn in range(args.steps + 1):
            config.rollout.prompts_per_step = args.prompts if turn else min(args.prompts, WARM_UP_PROMPTS)
            for name in args.attention:
                config.model.attention = name
                with device_memory(world.device) as used:
                    _, metrics = grpo_step(parts, progress)
                progress.step += 1
                progress.has_moved = False
                part = {key: metrics[key] for key in (*PARTS, *OTHERS) if key in metrics}
                part["device_peak_gib"] = max(used)
                if world.is_main:
                    print(name, json.dumps(part), flush=True)
                if turn and args.plain and name == args.attention[-1]:
                    for key, detokenize in PLAIN.items():
                        plain.setdefault(key, []).append(plain_rate(parts, args, detokenize))
                        print(key, round(plain[key][-1]), flush=True)
                if turn:
                    found[name].append(part)
                rate = matmul_flops(world.device, config) if turn else 0.0
                if turn and world.is_main:
                    medians = [summary(way, steps, args, plain) for way, steps in found.items() if steps]
                    for row in medians:
                        row["matmul_tflops"] = rate / 1e12
                        row["mfu_update"] = mfu(row["perf/flops"] / world.size, row["time/update"], rate)
                    report(medians)


def summary(
    name: str, steps: list[dict[str, float]], args: argparse.Namespace, plain: dict[str, list[float]]
) -> dict[str, Any]:
    """Medians of the steps of one way of attention, of what all of them have."""
    common = [key for key in steps[0] if all(key in step for step in steps)]
    row = {key: statistics.median(step[key] for step in steps) for key in common}
    tokens = args.prompts * args.group_size * row["completions/mean_length"]
    rates = {"rollout_tokens_per_s": tokens / row["time/rollout"]}
    rates |= {key: statistics.median(found) for key, found in plain.items()}
    return {"attention": name, "steps": len(steps)} | row | rates


@contextmanager
def device_memory(device: torch.device) -> Iterator[list[float]]:
    """GiB in use on this GPU, by all that it holds, vLLM awake or asleep too; twenty times a second."""
    used, done = [0.0], threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            free, total = torch.cuda.mem_get_info(device)
            used.append((total - free) / GIB)

    thread = threading.Thread(target=look, daemon=True)
    if device.type == "cuda":
        thread.start()
    try:
        yield used
    finally:
        done.set()


def plain_rate(parts: Parts, args: argparse.Namespace, detokenize: bool) -> float:
    """Tokens a second of ``LLM.generate`` without log-probs, on fresh prompts of the same shape."""
    with parts.engine.awake(0):
        assert isinstance(parts.engine, VLLMEngine), "--plain needs rollout.engine=vllm"
        params = vllm_start.package().SamplingParams(
            n=args.group_size, max_tokens=args.completion, detokenize=detokenize
        )
        asked = [Request(p.token_ids, [], images=p.images) for p in parts.stream.take(args.prompts)]
        prompts: list[Any] = [as_prompt(request, parts.engine.images) for request in asked]
        started = time.perf_counter()
        outputs = parts.engine.llm.generate(prompts, params, use_tqdm=False)
        return sum(len(c.token_ids) for o in outputs for c in o.outputs) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--shape-of", type=Path, required=True, help="folder with a config.json")
    parser.add_argument(
        "--layers", type=int, help="only so many of the shape's; give each count a --run-dir of its own"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/full_step"))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--warm-up-prompt", type=int, help="tokens of the prompts of the step that compiles: --prompt")
    parser.add_argument("--images", type=int, default=0, help="of a prompt")
    parser.add_argument("--image-tokens", type=int, default=1024, help="of an image: a square number")
    parser.add_argument("--completion", type=int, default=1024)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--attention", nargs="+", choices=["grouped", "repeated"], default=["grouped", "repeated"])
    parser.add_argument("--steps", type=int, default=2, help="of each way of attention")
    parser.add_argument("--plain", action="store_true", help="also vLLM's tokens a second without log-probs (one rank)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows are added to this file")
    parser.add_argument("--commit", help="for the rows, where there is no git")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    names = ("prompts", "prompt", "images", "completion", "group_size", "layers")
    shape = {name: getattr(args, name) for name in names}
    origin, written = rows.origin(args.commit), []

    def report(medians: list[dict[str, Any]]) -> None:
        new = [origin | shape | {"overrides": args.overrides} | row for row in medians]
        print(json.dumps(new), flush=True)
        if args.json:
            rows.replace(args.json, written, new)
            written[:] = new

    steps(args, report)


if __name__ == "__main__":
    main()
