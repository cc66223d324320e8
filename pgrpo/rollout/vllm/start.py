"""The vLLM that is installed here: whether it is one that is supported, and how an engine starts in this process.

What this file knows of vLLM's insides, on the releases in ``TESTED``:
- ``VLLM_ENABLE_V1_MULTIPROCESSING=0`` runs the engine in this process, and ``distributed_executor_backend="external_launcher"`` on
  the process group that exists, with tensor-parallel groups of neighbouring ranks and the rank from the environment.
- It seeds this process's generators. ``logprobs_mode="raw_logprobs"`` gives log-probs of the model's logits, before temperature,
  top-k and top-p (0.26, 0.32; no mode gives them between temperature and top-k). With it FlashInfer would draw, on a GPU, unless
  ``VLLM_USE_FLASHINFER_SAMPLER`` is 0: what is tested is PyTorch's own sampling, from this process's generators.
- While it compiles, it sets ``TORCHINDUCTOR_CACHE_DIR`` and ``TRITON_CACHE_DIR`` for the whole process. At its start it times the
  kernels of FlashInfer where that package is installed, also for models that use none. On a Hopper GPU it would compute Gated
  DeltaNet's prefill with a kernel of FlashInfer's that a CUDA compiler must build first; its own kernels are Triton's.
- Before it is ready it samples with ``SamplingParams.for_sampler_warmup``, settings that use every kernel of its sampler: each is
  compiled at the first start on a machine, whatever a run will ask for (0.26 to 0.32, its second model runner).
- ``_run_in_subprocess`` of its registry of models calls a function in another process; ``inspect_model_cls`` keeps what it returns.
- Beside sleep mode, its own all-reduce kernels and their fusion with norms end in an illegal memory access once there are CUDA
  graphs (two H100s): ranks that share an engine sum by NCCL.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
import os
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from pgrpo.config import Config, ConfigError
from pgrpo.distributed.world import World
from pgrpo.planning.hub import load_hf_config
from pgrpo.planning.rope import fixed_ropes
from pgrpo.process.allocators import fixed_segments
from pgrpo.process.caches import keeping_caches
from pgrpo.process.deadline import deadline
from pgrpo.process.rng import rng_state, set_rng_state
from pgrpo.rollout.vllm import shared_decode
from pgrpo.rollout.vllm.images import EngineImages, start_arguments
from pgrpo.rollout.vllm.own_classes import own_classes
from pgrpo.rollout.vllm.requests import DEADLINE, vllm_errors
from pgrpo.rollout.vllm.whole_files import whole_files

log = logging.getLogger(__name__)
TESTED: dict[str, tuple[str, ...]] = {
    "0.26": ("cuda",),
    "0.28": ("cpu",),
    "0.29": ("cpu",),
    "0.30": ("cpu",),
    "0.31": ("cpu",),
    "0.32": ("cpu",),
}
"""Releases of vLLM that passed the engine's contract tests, and on which devices (``make test-vllm VLLM=0.30``). A GPU takes all of
them: what a CPU tests is most of what this package touches."""


LONG_PROMPT, PREFILL_TOKENS = 16_384, 2048
"""Prompts of more tokens than the first are computed in parts of the second."""
GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)


def is_installed() -> bool:
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None  # not a mere folder of that name on the path


def package() -> Any:
    """vLLM; not ``import vllm``, which type checkers take for the file beside this one."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # It warns of each layer that has no weights of its own.
    level = os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(level.upper())  # 0.32 itself sets it when an engine starts
    os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    return importlib.import_module("vllm")


def import_engine(device: torch.device) -> None:
    """Import what ``start`` needs, which takes seconds and no memory of the GPU."""
    with vllm_errors("start"):
        _ = package().LLM
        importlib.import_module(f"vllm.v1.worker.{'gpu' if device.type == 'cuda' else 'cpu'}_worker")


def release(version: str) -> str:
    """``0.26`` of ``0.26.1``."""
    return ".".join(version.split(".")[:2])


def recording_loader(layer: Any, name: str) -> None:
    """During a reload, let the ``weight_loader`` of a parameter record a whole tensor (``loading.py`` says which need it)."""
    from vllm.model_executor.model_loader.reload import layerwise  # pyright: ignore[reportMissingImports]

    parameter = getattr(layer, name)
    parameter.weight_loader = layerwise.default_weight_loader  # which the recording one wraps
    parameter.weight_loader = layerwise.make_online_process_loader(layer, name)


def check_version(config: Config, device: torch.device) -> None:
    """Refuse a vLLM that was not tested, or that cannot share prompts though it must.

    Raises:
        ConfigError: with the versions that are supported and the key to override.
    """
    version = package().__version__
    allowed = [name for name, devices in TESTED.items() if device.type == "cuda" or device.type in devices]
    if release(version) not in allowed and not config.rollout.allow_untested_vllm:
        raise ConfigError(
            f"rollout.engine=vllm: vLLM {version} was not tested for a {device.type} device, {', '.join(allowed)} were: install "
            "one of those, or set rollout.allow_untested_vllm=true, or rollout.engine=embedded"
        )
    if config.rollout.shared_decode == "always" and (reason := shared_decode.cannot(config, device.type, version)):
        shared_decode.plainly(config, reason)


def prepare(config: Config, world: World) -> None:
    """What must be there before ``start``: a version that is supported, the rank in the environment, a process group.

    Raises:
        ConfigError: vLLM is of an untested version.
    """
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.device.index or 0), ("WORLD_SIZE", world.size)):
        os.environ.setdefault(name, str(value))
    check_version(config, world.device)
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


class Started(NamedTuple):
    """An ``LLM`` whose weights are still to come, and what a run's log says of it."""

    llm: Any
    notes: list[str]


def start(
    config: Config,
    world: World,
    memory_share: float,
    images: EngineImages | None = None,
    *,
    sleeps: bool = False,
    cache_bytes: int | None = None,
) -> Started:
    """Start vLLM. A collective call.

    Args:
        memory_share: of the GPU's memory, for weights, keys and values (vLLM's ``gpu_memory_utilization``).
        images: of a model with a vision tower.
        sleeps: with sleep mode.
        cache_bytes: for keys and values; None: what vLLM measures within its share.

    Raises:
        EngineError: it cannot be started as configured.
    """
    rollout, state = config.rollout, rng_state()
    waiting = deadline(rollout.vllm_deadline_s, "starting vLLM", DEADLINE)
    with (
        keeping_caches(), fixed_segments(), waiting, vllm_errors("start"), own_classes(), whole_files(), ExitStack() as starting,
    ):  # fmt: skip
        backend, decoding = _shared_backend(config, world.device.type)
        if backend is not None:
            starting.enter_context(backend.registered(rollout.group_size))
        warm_up_this_model_only(world.device)
        _warm_up_this_sampling_only(config)
        inspect_model_here()
        llm = package().LLM(
            **model_arguments(config),
            load_format="dummy",  # the first push brings them
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=config.tensor_parallel_size,
            disable_custom_all_reduce=True,
            compilation_config={"pass_config": {"fuse_allreduce_rms": False}, **_graph_sizes(config, world)},
            kernel_config={"enable_flashinfer_autotune": False},
            max_num_seqs=rollout.max_concurrent,
            **prefill(config),
            gpu_memory_utilization=memory_share,
            kv_cache_memory_bytes=cache_bytes,
            enforce_eager=rollout.enforce_eager,
            enable_prefix_caching=True,
            enable_sleep_mode=sleeps,
            **({"enable_return_routed_experts": True} if rollout.compare_experts else {}),
            logprobs_mode="raw_logprobs",
            language_model_only=images is None,  # of a model with images that is trained as text
            **start_arguments(images, known := _arguments()),
            **({"gdn_prefill_backend": "triton"} if "gdn_prefill_backend" in known else {}),
        )
        if backend is not None and (reason := backend.why_not(llm.llm_engine.vllm_config)):
            shared_decode.plainly(config, reason)
            decoding = shared_decode.PLAIN.format(reason)
        cache = llm.llm_engine.vllm_config.cache_config
        room = tell_room(config, world.size, cache.num_gpu_blocks * cache.block_size)
        if prefill(config):
            room += f"; prompts are computed in parts of {prefill(config)['max_num_batched_tokens']:,} tokens"
    set_rng_state(state)
    return Started(llm, [room, decoding, *([_images_text(llm)] if images and images.most else [])])


def model_arguments(config: Config) -> dict[str, Any]:
    """Which model, and how it runs."""
    model = config.model
    return {
        "model": model.path,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "dtype": model.dtype,
        "seed": config.seed,
        "max_model_len": config.max_sample_tokens,
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        **_positions(config),
    }


def _positions(config: Config) -> dict[str, Any]:
    """``model.max_positions`` in the place of the config.json's, from which vLLM has the rows of its table of rotary embeddings;
    not where these have another length by their scaling, or other angles."""
    if config.model.max_positions is None or fixed_ropes(hf_config := load_hf_config(config.model)):
        return {}
    own = {"max_position_embeddings": config.model.max_positions}
    return {"hf_overrides": own if hf_config.get_text_config() is hf_config else {"text_config": own}}


def _arguments() -> list[str]:
    """What ``LLM`` takes beside its own arguments."""
    return [one.name for one in fields(package().EngineArgs)]


def _images_text(llm: Any) -> str:
    """How much of images vLLM keeps."""
    model = llm.llm_engine.vllm_config.model_config
    rows = llm.llm_engine.engine_core.engine_core.scheduler.encoder_cache_manager.cache_size
    deep = len(getattr(model.hf_config.vision_config, "deepstack_visual_indexes", None) or ())
    mib = rows * model.hf_text_config.hidden_size * (1 + deep) * model.dtype.itemsize / 2**20
    return f"vLLM keeps features of {rows:,} tokens of images ({mib:,.0f} MiB) while it samples"


def inspect_model_here() -> None:
    """The first time that vLLM meets a model, it imports the model's file in another process, which takes as long as importing
    vLLM. That spares a process CUDA, which this one has, and it needs the file anyway."""
    registry: Any = importlib.import_module("vllm.model_executor.models.registry")
    registry._run_in_subprocess = lambda inspect: inspect()


def warm_up_this_model_only(device: torch.device) -> None:
    """vLLM 0.26 compiles 64 kernels for routers of four large models at every start, whatever the model, wherever flash-attn-4's
    compiler is installed. Later releases look at the model first."""
    if device.type == "cuda" and release(package().__version__) == "0.26":
        warm_up: Any = importlib.import_module("vllm.model_executor.warmup.kernel_warmup")
        warm_up._LL_BF16_WARMUP_MODEL_SHAPES = ()


def _warm_up_this_sampling_only(config: Config) -> None:
    """Let vLLM's warm-up sample as rollouts do. What greedy evaluations and the canary call beside that is compiled then."""
    params: Any = package().SamplingParams
    params.for_sampler_warmup = partial(params, top_p=config.rollout.top_p, top_k=config.rollout.top_k, logprobs=0)


def _graph_sizes(config: Config, world: World) -> dict[str, list[int]]:
    """Batch sizes that CUDA graphs are captured for: a third of vLLM's own. Each takes time at the start, and a batch that is
    padded by a quarter is hardly slower. A whole decode step is one graph only where the padded batch, too, has no more than
    ``max_concurrent`` sequences, so this is one of the sizes."""
    if world.device.type != "cuda" or config.rollout.enforce_eager:
        return {}
    at_once = config.rollout.max_concurrent
    most = min(2 * at_once, GRAPH_SIZES[-1])
    return {
        "cudagraph_capture_sizes": sorted({size for size in GRAPH_SIZES if size < most} | {most, min(at_once, most)})
    }


def prefill(config: Config) -> dict[str, Any]:
    """How prompts are computed: long ones in parts of fewer tokens than vLLM's own, as the canary has the log-probs of all tokens
    of a part in memory, over the whole vocabulary and in float32."""
    if config.data.max_prompt_tokens <= LONG_PROMPT:
        return {}
    return {
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": max(PREFILL_TOKENS, config.rollout.max_concurrent),
    }


def completions_at_once(config: Config, ranks: int) -> int:
    """The most completions of a step that one of the engines decodes at once."""
    rollout = config.rollout
    prompts = math.ceil(rollout.prompts_per_step * config.tensor_parallel_size / ranks)
    return min(rollout.max_concurrent, prompts * rollout.group_size)


def tell_room(config: Config, ranks: int, tokens: int) -> str:
    """How many completions at their longest fit a cache of so many tokens, with their prompts. Warns if they are too few."""
    rollout, prompt = config.rollout, config.data.max_prompt_tokens
    completion, size = config.max_sampled_tokens, rollout.group_size
    groups, rest = divmod(tokens, prompt + size * completion)
    fit, wanted = groups * size + max(0, rest - prompt) // completion, completions_at_once(config, ranks)
    text = f"vLLM's cache holds {tokens:,} tokens: {fit} completions at their longest, of {wanted} at once"
    if fit < wanted and os.environ.get("RANK", "0") == "0":
        more = " set rollout.offload_policy=auto," if rollout.offload_policy == "never" else ""
        log.warning(
            "%s. Where they get that long, the last are stopped and computed again (rollout/preemptions):%s raise "
            "rollout.gpu_memory_utilization, or lower rollout.max_concurrent", text, more,
        )  # fmt: skip
    return text


def _shared_backend(config: Config, device_type: str) -> tuple[Any, str]:
    """``shared_backend``; None where each completion is to read its prompt for itself. And what to say."""
    if reason := shared_decode.not_wanted(config, device_type):
        return None, shared_decode.PLAIN.format(reason)
    if reason := shared_decode.cannot(config, device_type, package().__version__):
        shared_decode.plainly(config, reason)
        return None, shared_decode.PLAIN.format(reason)
    return importlib.import_module("pgrpo.rollout.vllm.shared_backend"), "a decode step reads a group's prompt once"
