"""Loads the policy's weights into vLLM's model, and checks that all arrived.

This file depends on these internals of vLLM:
- The worker's ``reload_weights`` calls the model's ``load_weights`` once, with Hugging Face names. ``load_weights`` returns the
  names of the model's own parameters that it wrote; vLLM only warns about the others. ``packed_modules_mapping`` lists fused ones,
  and ``hf_to_vllm_mapper``, where a model has it, renames Hugging Face names to its own, or drops them (None).
- ``load_weights`` says nothing of weights that it has no place for, if their names end in ``.bias`` (0.26, 0.32), and models skip
  more (``skip_prefixes`` of 0.26, or their own loops over names). A module that was not built is a ``StageMissingLayer``: the
  tower of a model that gets no images.
- The model runners compute logits with the model's ``compute_logits``, outside CUDA graphs, for sampling and for prompt log-probs.
- ``reload_weights`` puts the parameters on the meta device, calls ``load_weights`` with loaders (``weight_loader``) that record
  what they get, and loads a layer once it is complete (``reload.layerwise``, 0.26 to 0.32). What ``load_weights`` copies into a
  parameter itself is lost: in gpt-oss sinks (``param.data.copy_``) and experts (``param.copy_``).
- ``reload_weights`` takes a millisecond a tensor on the host, whatever its size. Where kernels read parameters as ``load_weights``
  writes them, ``load_weights`` alone, as at a start from a checkpoint, leaves the same bits in a quarter of that time: on a GPU in
  models whose layers have the quantization methods in ``PLAIN`` (whose ``process_weights_after_loading`` is for CPUs and XPUs), and
  of which nothing but ``Attention`` processes weights after loading.
- Latent attention (``MLAAttention``) makes two more parameters of its ``kv_b_proj`` after loading: ``W_UK_T`` and ``W_UV``.
- Shared experts are modules of their layer and, in models of transformers' classes, of what runs its experts.
- On a CPU, vLLM repacks a linear layer's weight after loading, so it cannot be read back. A head tied to the embedding is repacked
  once, and a reload does not update that copy. Experts are packed in place, once: a reload leaves them as they are in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pgrpo.model.head import NEVER
from pgrpo.rollout.vllm.delivery import Delivery
from pgrpo.rollout.vllm.requests import EngineError
from pgrpo.rollout.vllm.start import recording_loader

COPIED = {"GptOssForCausalLM": ("w13_weight", "w13_bias", "w2_weight", "w2_bias")}
"""Models of vLLM whose ``load_weights`` copies past the recording loaders -> their parameters of experts. The sinks are others."""

PLAIN = ("UnquantizedLinearMethod", "UnquantizedEmbeddingMethod")


def loads_in_place(model: nn.Module) -> bool:
    """Whether a GPU's kernels read this model's parameters as its ``load_weights`` writes them."""
    for layer in model.modules():
        method, kind = getattr(layer, "quant_method", None), type(layer).__name__
        if method is not None and type(method).__name__ not in PLAIN:
            return False
        if kind != "Attention" and hasattr(layer, "process_weights_after_loading"):
            return False
    return True


def _load(llm: Any, model: Any, weights: Iterator[tuple[str, Tensor]], *, in_place: bool) -> None:
    if not in_place:
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        return
    with torch.no_grad():
        model.load_weights(weights)
    for layer in model.modules():
        if type(layer).__name__ == "Attention":  # as a reload does: backends may keep sinks in another precision
            layer.process_weights_after_loading(llm.llm_engine.vllm_config.model_config.dtype)


def load(
    llm: Any,
    model: Any,
    weights: Iterator[tuple[str, Tensor]],
    names: set[str],
    call: Callable[[str, Callable[[], Any]], Any],
    *,
    is_packed: bool,
    ranks: int,
    rank: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> None:
    """A collective call of the ranks that share an engine, and of those that share the weights.

    Args:
        llm, model: vLLM's.
        weights, names: what is sent, and all names that must be.
        call: calls a function of vLLM, whose name in errors is its first argument, with a deadline.
        is_packed: whether vLLM packed its weights at its start, on a CPU.
        ranks, sum_over_ranks: see ``Delivery.check``.
        rank: this process among those that share the engine.

    Raises:
        DeliveryError: not every weight arrived on this rank.
        EngineError: vLLM failed, or kept keys and values of the weights before.
    """
    written: set[str] = set()
    load_weights, delivery = model.load_weights, Delivery(weights)
    sending = iter(delivery)
    mapper = getattr(model, "hf_to_vllm_mapper", None)

    def rename(name: str) -> str | None:
        return name if mapper is None else next(iter(mapper.apply_dict({name: None})), None)

    def load_and_note(weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        if copied := COPIED.get(type(model).__name__):
            _record_copies(model, copied)
            weights = sinks_aside(model, weights, rename, rank, written)
        written.update(names := load_weights(weights))
        return names

    model.load_weights = load_and_note
    try:
        in_place = not is_packed and loads_in_place(model)
        call("weight push", lambda: _load(llm, model, sending, in_place=in_place))
    except Exception:
        for _ in sending:  # gathering is collective: other ranks wait for this rank's shards
            pass
        raise
    finally:
        del model.load_weights
    if is_packed:
        _pack_again(model)
    parameters = reported(model, written)
    delivery.check(
        names,
        written,
        parameters,
        getattr(model, "packed_modules_mapping", {}),
        derived=take_halves(model, parameters),
        buffers=[name for name, _ in model.named_buffers(remove_duplicate=False)],
        absent=[name for name, module in model.named_modules() if type(module).__name__ == "StageMissingLayer"],
        rename=rename,
        ranks=ranks,
        sum_over_ranks=sum_over_ranks,
    )
    if not llm.reset_prefix_cache():
        raise EngineError("weight push: keys and values of the weights before are still in use by unfinished requests")


def reported(model: nn.Module, written: Set[str]) -> dict[str, Tensor]:
    """The parameters. Of several names of one, whose module vLLM put into a second place, it is the first that was written."""
    found: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if found.setdefault(parameter, name) not in written and name in written:
            found[parameter] = name
    return {name: parameter for parameter, name in found.items()}


def take_halves(model: nn.Module, parameters: dict[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """What latent attention keeps of its ``kv_b_proj`` in two halves and in other orders, out of the parameters: a name -> that of
    the projection's weight, and all elements of both halves."""
    names, found = {parameter: name for name, parameter in parameters.items()}, {}
    layer: Any
    for name, layer in model.named_modules():
        halves = [parameters.pop(half) for half in (f"{name}.W_UK_T", f"{name}.W_UV") if half in parameters]
        if halves:
            found[f"{name}.W_UK_T and W_UV"] = names[layer.kv_b_proj.weight], torch.cat([x.flatten() for x in halves])
    return found


def _record_copies(model: nn.Module, names: Sequence[str]) -> None:
    """Let the next ``copy_`` of parameters with these names, which are on the meta device, record its argument as loaders do."""

    def record(parameter: Any, value: Tensor) -> None:
        del parameter.copy_  # with which vLLM copies what it loaded into what its kernels read
        parameter.weight_loader(parameter, value)

    for layer in model.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if name in names:
                parameter: Any
                recording_loader(layer, name)
                parameter.copy_ = partial(record, parameter)


def sinks_aside(
    model: nn.Module,
    weights: Iterator[tuple[str, Tensor]],
    rename: Callable[[str], str | None],
    rank: int,
    written: set[str],
) -> Iterator[tuple[str, Tensor]]:
    """The weights but for the sinks, which their recording loaders get: each rank those of its heads.

    Biases of experts' down projections are copies: ranks other than the first one add none, and vLLM zeroes what it is given there.
    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, tensor in weights:
        if name.endswith(".sinks"):
            own = rename(name) or name
            heads = parameters[own].numel()
            parameters[own].weight_loader(parameters[own], tensor.narrow(0, rank * heads, heads))
            written.add(own)
        else:
            yield name, tensor.clone() if rank and name.endswith(".down_proj_bias") else tensor


def _pack_again(model: Any) -> None:
    """What vLLM packs at its start only."""
    embeddings, heads = set(), []
    for layer in model.modules():
        names = [cls.__name__ for cls in type(layer).__mro__]  # an embedding that scales is of a class of its own
        if "ParallelLMHead" in names:
            heads.append(layer)
        elif "VocabParallelEmbedding" in names:
            embeddings.add(id(layer.weight))
    for head in heads:
        if id(head.weight) in embeddings:
            head.quant_method.process_weights_after_loading(head)
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def shape_logits(model: Any, divisor: Callable[[], float], banned: Sequence[int] = ()) -> None:
    """Let the model itself divide its logits by the temperature, and leave out banned ids. vLLM's raw log-probs (before top-k and
    top-p) are then those of the trainer's distribution."""
    compute_logits, ids = model.compute_logits, torch.tensor(banned, dtype=torch.long)

    def shaped(*args: Any, **kwargs: Any) -> Any:
        nonlocal ids
        logits = compute_logits(*args, **kwargs)
        logits = logits if divisor() == 1.0 else logits.float() / divisor()
        if banned:
            ids = ids.to(logits.device)
            logits.index_fill_(-1, ids, NEVER)
        return logits

    model.compute_logits = shaped
