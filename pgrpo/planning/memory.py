"""Estimates the GPU memory of a run from the sizes of its model. Numbers only, no tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pgrpo.planning.flops import ModelDims
from pgrpo.types import KEEPS_MLP, Recompute

GIB = 2**30

OF_UPDATES = (
    "gradients", "moments", "teacher_forward", "activations", "kept", "logprobs", "layer_backward", "reductions", "adam_scratch",
    "host",
)  # fmt: skip
"""What only updates need."""
OFFLOAD_SCRATCH = 3 * 2 * 4 * 2**26
"""Bytes: three pieces of two float32 moments (``training/offload.py``, ``PIECE``) are on the GPU at once."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Estimated GiB on one device. Excludes the CUDA context (about 0.5), fragmentation and other processes.

    Attributes:
        weights, gradients, moments: this rank's share, in float32; moments are the two of Adam. With LoRA the weights are in the
            compute dtype, and gradients and moments are those of the adapters.
        reference: weights of the frozen initial model in the compute dtype, and its gathered embedding and head. 0 without a KL
            term, and 0 with LoRA, where the policy's own weights are the initial model.
        teacher: the same of the model of ``loss.teacher``, also with LoRA.
        teacher_forward: of the teacher's pass over a micro-batch before the policy's: two gathered layers, one layer's activations,
            images, and a chunk of logits; and of what the policy's micro-batch before left gathered, what ``stay_gathered`` does
            not count: embedding and head, and the last two layers if all stay. With the full KL it may be between the passes of
            a kept prefix, whose activations, keys and values are there then.
        gathered: unsharded copies of weights in the compute dtype, while in use: the embedding and head, and two layers.
        stay_gathered: the same of other layers, which stay gathered from an update's first forward to its last backward, and during
            a rollout of the embedded engine.
        activations: tensors that the forward of a full micro-batch keeps for the backward. With LoRA there are up to a fifth
            less, which this ignores.
        kept: keys, values and states of a prefix that is kept for several passes (``model/kept.py``), and their gradients. With the
            full KL to a teacher, also the teacher's keys, values and states.
        logprobs: a chunk of logits, and the head's float32 gradient if it has one. The backward begins with them. With the full KL
            to a teacher, whose chunks of logits are half the size, also its hidden states.
        layer_backward: the rest of the backward, one layer at a time: recomputed activations, what the MLP's backward has beside
            them, a mixture's copies of rows, gradients of its gathered copies, and the head's gradient.
        reductions: with hybrid sharding, a micro-batch's float32 gradients that are reduced over the replicas. FSDP2 holds all of
            them until the backward ends, when the activations are freed. 0 with one replica.
        adam_scratch: temporaries of the optimizer step: none with fused AdamW (GPU); as large as the trained parameters on a CPU;
            the pieces in transit where the moments are in host memory.
        kv_cache: keys, values and states of the embedded engine, with all completions at full length.
        tower: features of a micro-batch's images, and what a trained tower and projector keep for their backward.
        tower_forward: one layer of the tower with all images that it computes at once, before there are activations.
        offloaded: weights and moments that are in host memory while vLLM samples.
        host: inputs of layers that wait in host memory for their backward (``offload``); not on the device.
    """

    weights: float
    gradients: float
    moments: float
    reference: float
    teacher: float
    teacher_forward: float
    gathered: float
    stay_gathered: float
    activations: float
    kept: float
    logprobs: float
    layer_backward: float
    reductions: float
    adam_scratch: float
    kv_cache: float
    tower: float
    tower_forward: float
    offloaded: float
    host: float

    @property
    def resting(self) -> float:
        """What stays on the GPU between updates, while vLLM samples."""
        return self.weights + self.moments + self.reference + self.teacher - self.offloaded

    @property
    def rollout(self) -> float:
        own_forwards = self.kv_cache + self.stay_gathered + self.tower_forward if self.kv_cache else 0
        return self.resting + self.gathered + own_forwards

    @property
    def update(self) -> float:
        held = self.weights + self.gradients + self.moments + self.reference + self.teacher + self.stay_gathered
        begin = self.activations + self.kept + max(self.logprobs, self.layer_backward)
        # Features are there from the tower's forward to its backward, which is the last one.
        own = self.gathered + self.tower + max(begin, self.reductions + self.layer_backward, self.tower_forward)
        return held + max(own, self.teacher_forward)

    @property
    def optimizer_step(self) -> float:
        return self.weights + self.gradients + self.moments + self.reference + self.teacher + self.adam_scratch

    @property
    def peak(self) -> float:
        return max(self.rollout, self.update, self.optimizer_step)


def memory_plan(
    dims: ModelDims,
    *,
    token_budget: int,
    kept_tokens: int = 0,
    recompute: Sequence[Recompute],
    dtype_bytes: int,
    compiled: bool = False,
    ranks: int = 1,
    replicas: int = 1,
    together: int = 1,
    mlp_chunks: int = 1,
    stay_gathered: int = 0,
    adapters: int = 0,
    reference: bool = False,
    ref_offload: bool = False,
    teacher: ModelDims | None = None,
    teacher_offload: bool = False,
    full_kl: bool = False,
    offload: bool = False,
    concurrent: int = 0,
    group_size: int = 1,
    prompt_tokens: int = 0,
    completion_tokens: int = 0,
    logit_chunk_bytes: int = 2**30,
    image_tokens: int = 0,
    train_vision: bool = False,
    train_projector: bool = False,
    recompute_vision: bool = False,
    trains: bool = True,
    offloaded: Sequence[str] = (),
) -> MemoryPlan:
    """Estimate the memory of a run.

    Args:
        token_budget: packed tokens in one micro-batch, which ``together`` devices divide (sequence parallelism).
        kept_tokens: of the longest prefix that is kept for several passes.
        recompute: one entry a layer: what its backward recomputes.
        dtype_bytes: of the compute dtype: 2 (bfloat16) or 4 (float32).
        compiled: whether the layers are compiled; compiled layers keep less for the backward.
        ranks: devices that weights, gradients and moments are split over.
        replicas: number of such sets of devices (hybrid sharding).
        mlp_chunks: parts of the rows in which an MLP is computed, where its layer recomputes it.
        stay_gathered: number of layers that FSDP gathers once an update (``distributed/fsdp.py``).
        adapters: number of parameters that LoRA trains; 0 trains all of the model's.
        reference: whether there is a KL term to the initial model.
        ref_offload: whether that model is in host memory, except its gathered embedding and head.
        teacher: sizes of the model of ``loss.teacher``.
        teacher_offload: whether it is in host memory, except its gathered embedding and head.
        full_kl: whether the loss has the KL to it over the whole vocabulary.
        offload: whether the moments are in host memory.
        concurrent, group_size, prompt_tokens, completion_tokens: of the embedded engine; concurrent is 0 for another engine.
        logit_chunk_bytes: logits (and temporaries of their size) that the log-prob head holds at once.
        image_tokens: the most rows of images in a micro-batch.
        train_vision, train_projector: what is trained of what makes these rows. ``recompute_vision``: the backward computes layers
            of the tower again.
        trains: whether there are updates, without which there is nothing of ``OF_UPDATES``.
        offloaded: which of ``weights`` and ``moments`` are in host memory while vLLM samples.
    """
    weights = 4 * dims.parameters / ranks
    tower = _tower(dims, dtype_bytes, image_tokens, train_vision, train_projector, recompute_vision)
    trained = weights - 4 * tower.frozen / ranks
    embedding = dims.vocab * dims.hidden
    # FSDP's root keeps embedding and head gathered. Of the layers, one is in use while the next one is gathered.
    is_sharded = ranks > 1 or dtype_bytes != 4
    root = _root(dims) if is_sharded else 0
    two_layers, head = root and 2 * dims.layer_matrix, embedding
    gradients = two_layers
    if adapters:
        weights, trained = (dtype_bytes * dims.parameters + 4 * adapters) / ranks, 4 * adapters / ranks
        head, gradients = 0, root and 2 * adapters // dims.layers
        two_layers += gradients
    # Two layers that do not stay are in use beside those that do; if all stay, they are two of these.
    staying = min(stay_gathered, max(0, dims.layers - 2)) if trains or concurrent else 0
    rows = -(-token_budget // together)
    layer = _layer_activations(dims, dtype_bytes, compiled=compiled, together=together)
    one_input = dims.hidden * dtype_bytes
    copies = 2 * dims.active * one_input  # of a row for its experts, and what these give back
    kept: dict[Recompute, int] = {"none": layer, "full": one_input, "offload": 0}
    # Attention outputs with their float32 log-sum-exps, and the layer's input.
    kept["attention"] = one_input + dims.heads * (dims.value_dim * dtype_bytes + 4)
    kept["matmuls"] = kept["attention"] + _products(dims, compiled=compiled) * dtype_bytes
    recomputed = max(layer - kept[mode] if mode in KEEPS_MLP else layer for mode in recompute)
    parts_of_rows = 1 if KEEPS_MLP & set(recompute) else mlp_chunks
    if parts_of_rows > 1:
        recomputed = _layer_activations(dims, dtype_bytes, compiled=compiled, together=together, mlp_chunks=mlp_chunks)
    recomputed += _beside_activations(dims, parts_of_rows, lora=bool(adapters)) * dtype_bytes
    if "offload" in recompute:  # an input in use, one on its way, and one that was used and waits for its stream
        recomputed += 3 * one_input
    if together > 1:  # queries, keys and values before and after the exchange of rows for heads
        recomputed += 2 * _projections(dims, together) * dtype_bytes
    prefix = 2 * _kept(dims, dtype_bytes, kept_tokens, together)
    beside_teacher = (root + (stay_gathered - staying) * two_layers / 2) * dtype_bytes
    if teacher and full_kl and kept_tokens:
        prefix += _kept(teacher, dtype_bytes, kept_tokens, together)
        prefix_activations = sum(kept[mode] for mode in recompute) * -(-kept_tokens // together)
        beside_teacher += prefix + prefix_activations
    kv_rows = concurrent * completion_tokens + -(-concurrent // group_size) * prompt_tokens
    parts = MemoryPlan(
        weights=weights,
        gradients=trained,
        moments=0 if offload else 2 * trained,
        reference=_frozen(dims, dtype_bytes, ranks, ref_offload, is_sharded) if reference and not adapters else 0,
        teacher=_frozen(teacher, dtype_bytes, ranks, teacher_offload, is_sharded) if teacher else 0,
        teacher_forward=_layer_activations(teacher, dtype_bytes, compiled=compiled, together=together) * rows
        + 2 * teacher.layer_matrix * dtype_bytes * is_sharded
        + sum(_tower(teacher, dtype_bytes, image_tokens, False, False, False)[2:])
        + logit_chunk_bytes
        + beside_teacher
        if teacher
        else 0,
        gathered=(root + two_layers) * dtype_bytes,
        stay_gathered=staying * two_layers * dtype_bytes / 2,
        activations=sum(kept[mode] for mode in recompute) * rows,
        kept=prefix,
        logprobs=logit_chunk_bytes
        + head * (4 + dtype_bytes)
        + (teacher.hidden * dtype_bytes * rows if teacher and full_kl else 0),
        layer_backward=(recomputed + copies) * rows
        + (gradients + head + (0 if adapters else root and tower.trained)) * dtype_bytes,
        reductions=trained if replicas > 1 else 0,
        adam_scratch=OFFLOAD_SCRATCH if offload else trained if dtype_bytes == 4 else 0,
        kv_cache=_kv_row(dims, dtype_bytes) * kv_rows + 4 * dims.state_elements * concurrent,
        tower=tower.kept,
        tower_forward=tower.forward,
        offloaded=0,
        host=list(recompute).count("offload") * one_input * rows,
    )
    if not trains:
        parts = replace(parts, **dict.fromkeys(OF_UPDATES, 0))
    parts = replace(parts, offloaded=sum(getattr(parts, name) for name in offloaded))
    return MemoryPlan(*(getattr(parts, name) / GIB for name in MemoryPlan.__slots__))


def _root(dims: ModelDims) -> int:
    """Elements of the embedding, the head, and the vision tower."""
    tower = dims.tower.parameters + dims.tower.projector_parameters if dims.tower else 0
    return dims.vocab * dims.hidden * (1 if dims.tied else 2) + tower


class _Tower(NamedTuple):
    """Parameters that are frozen and trained; bytes that are kept, and that the forward takes meanwhile."""

    frozen: int = 0
    trained: int = 0
    kept: int = 0
    forward: int = 0


def _tower(
    dims: ModelDims, dtype_bytes: int, image_tokens: int, train_vision: bool, train_projector: bool, recompute: bool
) -> _Tower:
    if (tower := dims.tower) is None:
        return _Tower()
    both = (tower.parameters, train_vision), (tower.projector_parameters, train_projector)
    trained = sum(size for size, is_trained in both if is_trained)
    rows, layer = image_tokens * tower.rows_a_token, tower.layer_activations(dtype_bytes)
    kept = image_tokens * dims.hidden * (1 + tower.deep) * dtype_bytes
    if train_projector or train_vision:  # the projector's input, normalised, and around its activation function
        kept += 4 * rows * tower.hidden * (1 + tower.deep) * dtype_bytes
    if train_vision:
        kept += rows * tower.layers * (tower.hidden * dtype_bytes if recompute else layer)
    return _Tower(sum(size for size, _ in both) - trained, trained, kept, rows * layer)


def _frozen(dims: ModelDims, dtype_bytes: int, ranks: int, offload: bool, is_sharded: bool) -> float:
    """Bytes of a frozen model, whose root stays gathered during the updates."""
    return dtype_bytes * ((_root(dims) if is_sharded else 0) + (0 if offload else dims.parameters / ranks))


def _kv_row(dims: ModelDims, dtype_bytes: int) -> int:
    """Bytes of a token's keys and values in all layers."""
    return len(dims.windows) * dims.kv_heads * (dims.head_dim + dims.value_dim) * dtype_bytes


def _kept(dims: ModelDims, dtype_bytes: int, tokens: int, together: int) -> float:
    """Bytes of what one of ``together`` ranks keeps of a prefix: keys and values at its heads, and states."""
    if not tokens:
        return 0
    return _kv_row(dims, dtype_bytes) * _copies(dims, together) / together * tokens + 4 * dims.state_elements


def _products(dims: ModelDims, *, compiled: bool) -> int:
    """Elements of a token's matrix products: queries, keys, values, gate, up, and the outputs of attention and MLP. Compiled layers
    keep those of the outputs that a norm reads; others are only added up."""
    return _projections(dims, 1) + 2 * dims.intermediate + (dims.normed if compiled else 2) * dims.hidden


def _projections(dims: ModelDims, together: int) -> int:
    """Elements of a token's queries, keys and values."""
    return (dims.heads + 2 * dims.kv_heads * _copies(dims, together)) * dims.head_dim


def _copies(dims: ModelDims, together: int) -> int:
    """How many copies there are of a key/value head, which several of the ranks that compute a batch ``together`` may need."""
    return together // math.gcd(dims.kv_heads, together)


def _beside_activations(dims: ModelDims, mlp_chunks: int, *, lora: bool) -> int:
    """Elements a token that a layer's backward has in memory beside the layer's activations, most of them while it is in the MLP:
    gradients of gate, up and their product; with parts of the rows also the parts' inputs and outputs beside the whole. With LoRA
    gate, up and the product's gradient are sums of two products, and the gradients of gate and up are there once more, as the
    adapters scale them; so it is with what has the hidden size. Counted of what torch.compile makes of Qwen3's layers."""
    inner, hidden, of_parts = (8, 4, 4) if lora else (3, 0, 2)
    return inner * dims.intermediate // mlp_chunks + (hidden + of_parts * (mlp_chunks > 1)) * dims.hidden


def _layer_activations(
    dims: ModelDims, dtype_bytes: int, *, compiled: bool, together: int = 1, mlp_chunks: int = 1
) -> int:
    """Bytes a token that one layer keeps for its backward. Eager: counted from what autograd saves in transformers' layers.
    Compiled: what matrix products and attention need; the compiler recomputes everything between them."""
    q, kv = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim
    norms = dims.norms * dims.hidden * (4 + 2 * dtype_bytes)  # the float32 input, the normalised and the scaled output
    attention = max(q + _projections(dims, together), dims.state_width) * dtype_bytes
    head_norms = (q + kv) * (4 + dtype_bytes) if dims.head_norms else 0
    # Gate, its silu, up, their product; and of experts that times the routing weights.
    mlp = (5 if dims.active else 4) * dims.intermediate * dtype_bytes
    if compiled:
        norms = dims.norms * dims.hidden * 2 * dtype_bytes  # input and output
        head_norms = (q + kv) * dtype_bytes if dims.head_norms else 0  # input
        mlp = 3 * dims.intermediate * dtype_bytes  # gate, up, their product
    return norms + attention + head_norms + mlp // mlp_chunks
