"""Times an update on prompts with images, the vision tower included: each prompt once, against a copy of it for every completion.

    python benchmarks/images.py --images 2 8 --repeats 3 --json benchmarks/h100_images.json
    python benchmarks/images.py --images 2 --json FILE -- model.train_vision=true model.train_projector=true
    python benchmarks/images.py --shape-of FOLDER --images 1 2 --scale 16 --prompts 2 --token-budget 2048      # on a CPU

``--shape-of`` is a folder with the config.json of a Qwen-VL. An update is the forward and backward of all micro-batches of
``--token-budget`` rows, on random weights, tokens and pixels; there is no optimizer. It begins without features of images: a frozen
tower (the default) runs once an image, in both ways, and a trained one once an image and micro-batch, as in training. Image
processors are not part of it. Both ways run in turn, ``--repeats`` times, after up to three micro-batches of each that compile;
times are medians, on a GPU by device events. FLOPs of the tower are counted by PyTorch (``FlopCounterMode``) in its forward on one
image, and three times for a tower that is trained; those of the language model are of ``planning/flops.py``. MFU is relative to a
matrix product timed in the same run. ``--scale`` divides lengths of text. The rows are written after each number of images.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from pgrpo.commands.bench import _matmul_flops, _milliseconds, random_model
from pgrpo.config import Config, load_config
from pgrpo.distributed.world import World
from pgrpo.model.families.vision import freeze
from pgrpo.model.policy import Policy
from pgrpo.packing.balance import share_out
from pgrpo.packing.batch import GroupedBatch, build_batch
from pgrpo.packing.forest import Work
from pgrpo.placement.choices import compute_dtype
from pgrpo.planning.flops import GIB, UPDATE_OVER_FORWARD, ModelDims, forest_update_flops
from pgrpo.training.place import wrap
from pgrpo.types import Image, PromptImages, Sample
from pgrpo.vision.families import image_token_id, never_sampled
from pgrpo.vision.processors import positions_3d

WARM_UP_BATCHES = 3


def make_pixels(config: Any, side: int) -> dict[str, Tensor]:
    """Random pixels of one image with ``side`` x ``side`` tokens, as a Qwen-VL's image processor makes them."""
    tower = config.vision_config
    patches = side * tower.spatial_merge_size
    width = getattr(tower, "in_channels", 3) * tower.temporal_patch_size * tower.patch_size**2
    return {"pixel_values": torch.randn(patches**2, width), "image_grid_thw": torch.tensor([[1, patches, patches]])}


def make_samples(config: Any, images: int, side: int, args: argparse.Namespace) -> list[Sample]:
    """Half of a prompt's text is in front of its images, and half behind them."""
    rnd, banned = random.Random(0), {*never_sampled(config), image_token_id(config)}
    words = [i for i in range(min(config.get_text_config().vocab_size, 50_000)) if i not in banned]
    text, completion = args.text // args.scale, args.completion // args.scale
    samples = []
    for prompt in range(args.prompts):
        first = rnd.choices(words, k=text // 2)
        runs = [(len(first) + i * side**2, len(first) + (i + 1) * side**2) for i in range(images)]
        placed = tuple(Image(f"{prompt}/{i}", (run,)) for i, run in enumerate(runs))
        ids = first + [image_token_id(config)] * (images * side**2) + rnd.choices(words, k=text - len(first))
        found = PromptImages(placed, [], positions_3d(len(ids), placed, [(side, side)] * images))
        for _ in range(args.group_size):
            own = rnd.choices(words, k=completion)
            samples.append(
                Sample(ids, own, [True] * len(own), [0.0] * len(own), advantages=[1.0] * len(own), images=found)
            )
    return samples


def update(policy: Policy, batches: Sequence[GroupedBatch]) -> None:
    assert policy.vision is not None
    policy.vision.forget()
    for batch in batches:
        policy(batch).logprobs.sum().backward()
    policy.zero_grad(set_to_none=True)


def tower_flops(policy: Policy) -> int:
    """FLOPs of the tower's forward on one image."""
    assert policy.vision is not None
    base: Any = policy.model.base_model
    dtype = next(policy.parameters()).dtype
    pixels = {k: x.to(policy.device) for k, x in policy.vision.pixels("").items()}
    pixels = {k: x.to(dtype) if x.is_floating_point() else x for k, x in pixels.items()}

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    on_a_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}  # which PyTorch does not count
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=on_a_cpu) as counter:
        base.get_image_features(**pixels, return_dict=True)
    return counter.get_total_flops()


def measure(policy: Policy, config: Config, images: int, args: argparse.Namespace) -> dict[str, Any]:
    vision, model, on_gpu = policy.vision, policy.model, policy.device.type == "cuda"
    assert vision is not None
    side = round(args.image_tokens**0.5)
    pixels = {"": make_pixels(model.config, side)}
    vision.pixels = lambda key: pixels.setdefault(key, {k: x.clone() for k, x in pixels[""].items()})
    vision.dummy = lambda: pixels[""]
    dims, samples = ModelDims.from_config(model.config), make_samples(model.config, images, side, args)
    ways: dict[str, list[GroupedBatch]] = {}
    for way in ("grouped", "repeated"):

        def cost(each: Work) -> np.ndarray:
            return forest_update_flops(dims, each)

        (plan,) = share_out(samples, 1, args.token_budget, cost, policy.attention, is_shared=way == "grouped")
        ways[way] = [build_batch(forest, device=policy.device, attention=policy.attention) for forest in plan]
    an_image = tower_flops(policy)
    for batches in ways.values():
        update(policy, batches[:WARM_UP_BATCHES])
    rate = _matmul_flops(policy.device, config)
    times: dict[str, list[float]] = {way: [] for way in ways}
    ran, peaks = {}, {}
    for _ in range(args.repeats):
        for way, batches in ways.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            before = vision.images
            times[way].append(_milliseconds(lambda batches=batches: update(policy, batches), policy.device) / 1e3)
            ran[way] = vision.images - before
            peaks[way] = torch.cuda.max_memory_allocated() / GIB if on_gpu else float("nan")
            print(f"{images} images, {way}: {times[way][-1]:.3f} s", flush=True)
    rate = max(rate, _matmul_flops(policy.device, config))
    row: dict[str, Any] = {
        "images": images, "image_tokens": side**2, "text": args.text // args.scale,
        "completion": args.completion // args.scale, "group_size": args.group_size, "prompts": args.prompts,
        "token_budget": args.token_budget, "recompute": config.model.activation_checkpointing,
        "trained": [k for k in ("train_vision", "train_projector") if getattr(config.model, k)],
        "matmul_tflops": rate / 1e12, "tower_flops_an_image": an_image, "repeats": args.repeats,
    }  # fmt: skip
    for way, batches in ways.items():
        text = sum(int(forest_update_flops(dims, b.work).sum()) for b in batches)
        tower = ran[way] * an_image * (UPDATE_OVER_FORWARD if config.model.train_vision else 1)
        seconds, rows = statistics.median(times[way]), int(sum(b.work.rows.sum() for b in batches))
        row[way] = {
            "rows": rows, "micro_batches": len(batches), "images_in_the_tower": ran[way], "flops": text + tower,
            "tower_flops": tower, "seconds": seconds, "all_seconds": times[way], "peak_gib": peaks[way],
            "mfu": (text + tower) / seconds / rate,
        }  # fmt: skip
        print(
            f"{images} images, {way}: {len(batches)} micro-batches of {rows} rows in all, {ran[way]} images in the tower "
            f"({tower / (text + tower):.1%} of the FLOPs), {seconds:.3f} s, {peaks[way]:.1f} GiB, MFU {row[way]['mfu']:.3f}",
            flush=True,
        )
    row["flop_ratio"] = row["repeated"]["flops"] / row["grouped"]["flops"]
    row["time_ratio"] = row["repeated"]["seconds"] / row["grouped"]["seconds"]
    row["of_flop_ratio"] = row["time_ratio"] / row["flop_ratio"]
    print(
        f"{images} images: ratio of FLOPs {row['flop_ratio']:.2f}, of time {row['time_ratio']:.2f}: "
        f"{row['of_flop_ratio']:.3f}; matrix product {rate / 1e12:.1f} TFLOP/s",
        flush=True,
    )
    return row


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape-of", default="benchmarks/qwen3_vl_4b")
    parser.add_argument("--config", default="qwen3_4b.yaml")
    parser.add_argument("--images", nargs="+", type=int, default=[2, 8], help="a prompt's")
    parser.add_argument("--image-tokens", type=int, default=1024, help="of an image: a square number")
    parser.add_argument("--text", type=int, default=200)
    parser.add_argument("--completion", type=int, default=300)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--token-budget", type=int, default=49_152)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows are added to this file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(arguments)
    if round(args.image_tokens**0.5) ** 2 != args.image_tokens:
        parser.error(f"--image-tokens {args.image_tokens} is no square number: images here are square")
    on_gpu = torch.cuda.is_available()
    keys = [f"model.path={Path(args.shape_of).resolve()}", "rollout.engine=embedded"]
    keys += ["model.activation_checkpointing=attention"]
    keys += [] if on_gpu else ["model.dtype=float32", "model.compile=false"]
    config = load_config(args.config, [*keys, *args.overrides])
    if config.model.lora_rank or config.model.train_projector != config.model.train_vision:
        parser.error("FLOPs are counted of a whole tower that is frozen or trained, and without adapters")
    world = World(0, 1, torch.device("cuda", 0) if on_gpu else torch.device("cpu"))
    torch.manual_seed(0)
    model = random_model(config.model, compute_dtype(config), world.device)
    freeze(model, tower=not config.model.train_vision, projector=not config.model.train_projector)
    policy = wrap(model, config, world)
    if policy.vision is None or not policy.vision.family.positions_3d:
        parser.error(f"--shape-of {args.shape_of}: this is no Qwen-VL")
    print(f"attention kernel {policy.attention.kernel}: {policy.attention.reason}", flush=True)
    where = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU",
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    before, rows = [], []
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text())["rows"]
    for images in args.images:
        rows.append(where | measure(policy, config, images, args))
        if args.json:
            args.json.write_text(json.dumps({"rows": before + rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
