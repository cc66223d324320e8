"""Checks that all weights of a push arrived in the engine, by names and checksums."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

EXPERT = re.compile(
    r"(?P<layer>.+\.experts\.)\d+\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>weight|bias)"
)
STACK = re.compile(r"(?P<layer>.+\.experts\.)(?P<part>gate_up_proj|down_proj)")
"""All experts of a layer, which are sent so where the checkpoint does not have them one by one (Granite's)."""
NOT_SAMPLED_WITH = re.compile(r"(.*\.)?mtp[._].*|.*(inv_freq|cos_cached|sin_cached)")
"""Names that a policy's own code may have and engines rightly leave out: heads of multi-token prediction, and tables of rotary
embeddings, which they compute from the config."""


class DeliveryError(RuntimeError):
    """After a push the engine does not have all of the policy's weights, or has no place for some."""


class Delivery:
    """The weights of one push. Iterate once, over (Hugging Face name, tensor): this records names and checksums."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.weights = weights
        self.sent: dict[str, Tensor] = {}
        self.sizes: dict[str, int] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights:
            self.sent[name], self.sizes[name] = bit_sum(tensor), tensor.numel()
            yield name, tensor

    def check(
        self,
        names: set[str],
        written: set[str],
        parameters: Mapping[str, Tensor],
        fused: Mapping[str, Sequence[str]],
        *,
        derived: Mapping[str, tuple[str, Tensor]] = MappingProxyType({}),
        buffers: Iterable[str] = (),
        absent: Iterable[str] = (),
        rename: Callable[[str], str | None] = lambda name: name,
        ranks: int = 1,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """A collective call of the ranks that share an engine.

        A weight that was sent must be a source of a parameter, or have the name of a buffer that was written: what an engine has no
        place for it may leave out without a word, and compute something else. Which weights those are cannot be told where an empty
        parameter is made of others than its name and ``fused`` say; then the checksums of the others are all that is checked.

        Args:
            names: all names that must be sent.
            written: names of the engine's parameters and buffers that it reports as written, or those that ``in_checkpoint`` gives
                them.
            parameters: the engine's parameters on this rank. Empty ones cannot be read back and are not compared.
            fused: fused parameter -> its sources, as ``qkv_proj`` -> ``[q_proj, k_proj, v_proj]``.
            derived: what the engine keeps of a parameter once more, in another order: a name -> the parameter's, and the elements.
            buffers: names of the engine's buffers. They are not compared: they may be of less precision than what was sent.
            absent: names of the engine's modules that it did not build, as the tower of a model that it is given no images for.
            rename: gives the name that the engine has for a weight, before it fuses (``model.embedding`` of gpt-oss); the same for
                several that it fuses itself; None for one that it leaves out.
            ranks: number of ranks that share the engine. Each has a part of a parameter, or all of it.
            sum_over_ranks: sums an int64 tensor over these ranks.

        Raises:
            DeliveryError: a name was not sent, is unknown, was not written or has no place, or a checksum differs.
        """
        if differing := sorted(names ^ self.sent.keys()):
            raise DeliveryError(f"weight push: {_some(differing)} were not sent, or are not the policy's")
        if missing := sorted(name for name in parameters if not written & {name, in_checkpoint(name)}):
            raise DeliveryError(f"weight push: the engine did not load {_some(missing)}")
        sent: dict[str | None, list[str]] = {}  # name that the engine has for them -> weights
        for name in self.sent:
            sent.setdefault(rename(name), []).append(name)
        experts = sources_of_experts(name for name in sent if name)
        place = {name: i for i, name in enumerate(self.sent)}
        placed = {weight for name in written.intersection(buffers) for weight in sent.get(name, ())}
        compared: list[str] = []
        found: list[Tensor] = []
        terms: list[tuple[int, int, int]] = []  # of the sums that are wanted: compared, sent, copies
        all_are_known = True
        own = [(name, name, parameter) for name, parameter in parameters.items()]
        for name, of, parameter in own + [(name, *source) for name, source in derived.items()]:
            of_experts = in_checkpoint(of)
            sources = [of_experts] if of_experts in sent else experts.get(of_experts) or sources_of(of, fused)
            is_known, is_compared = all(source in sent for source in sources), parameter.numel() > 0
            if is_compared and not is_known:
                raise DeliveryError(
                    f"weight push: the engine's {name} is made of {sources}, which the policy does not have"
                )
            all_are_known &= is_known
            weights = [weight for source in sources for weight in sent.get(source, ())]
            placed.update(weights)
            if not is_compared:
                continue
            # A parameter that is whole on each rank is counted once a rank. Zero padding (of a vocabulary) adds nothing, and biases
            # of experts' down projections are zero on all ranks but the first.
            is_whole = parameter.numel() >= sum(self.sizes[weight] for weight in weights)
            copies = ranks if is_whole and not name.endswith("experts.w2_bias") else 1
            terms += [(len(compared), place[weight], copies) for weight in weights]
            compared.append(name)
            found.append(bit_sum(parameter))
        if all_are_known and (ignored := _without_a_place(sent, placed, absent)):
            raise DeliveryError(
                f"weight push: vLLM's model has no place for {_some(ignored)}: it would sample from other distributions than the "
                "policy's. Set rollout.engine=embedded, or train a model whose config.json asks for no such weights"
            )
        sums, arrived = torch.stack([*self.sent.values()]), torch.stack(found)
        # One tensor, because each copy to a GPU waits.
        rows, columns, copies = torch.tensor(terms, device=arrived.device).unbind(1)
        wanted = torch.zeros_like(arrived).index_add_(0, rows, copies * sums[columns])
        unequal = (sum_over_ranks(arrived) != wanted).tolist()
        if wrong := [name for name, differs in zip(compared, unequal, strict=True) if differs]:
            raise DeliveryError(f"weight push: checksums of {_some(wrong)} are not those of the policy")


def bit_sum(tensor: Tensor) -> Tensor:
    """Checksum: the sum of the elements' bits as integers, a 0-d int64 tensor. Independent of order and sharding; 0 for zeros. Of
    bfloat16 it is that of the same numbers in float32, in which engines keep some weights (decays of Gated DeltaNet)."""
    width = tensor.element_size()
    integer = {2: torch.int16, 4: torch.int32}[width]
    total = tensor.detach().contiguous().view(integer).sum(dtype=torch.int64)
    return total * 2**16 if width == 2 else total


def in_checkpoint(name: str) -> str:
    """The name of an engine's parameter without ``routed_experts``, the module that vLLM has around the stacks of a layer's experts
    and checkpoints have not. vLLM 0.26 and 0.28 report what they wrote to these stacks by this name, 0.32 by the whole one."""
    return name.replace(".experts.routed_experts.", ".experts.")


def sources_of(name: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the weights that an engine fuses into a parameter: q, k and v of ``...qkv_proj.weight``."""
    for whole, parts in fused.items():
        if f".{whole}." in name:
            return [name.replace(f".{whole}.", f".{part}.") for part in parts]
    return [name]


def sources_of_experts(names: Iterable[str]) -> dict[str, list[str]]:
    """The parameters in which an engine stacks experts -> names of all weights in each: gate and up projections of all experts of a
    layer in ``...experts.w13_weight``, down projections in ``...experts.w2_weight``."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := EXPERT.fullmatch(name):
            stacked = "w2" if match["part"] in ("down_proj", "w2") else "w13"
            found.setdefault(f"{match['layer']}{stacked}_{match['kind']}", []).append(name)
        elif match := STACK.fullmatch(name):
            found[f"{match['layer']}{'w2' if match['part'] == 'down_proj' else 'w13'}_weight"] = [name]
    return found


def _without_a_place(sent: Mapping[str | None, list[str]], placed: set[str], absent: Iterable[str]) -> list[str]:
    """Weights that are not ``placed``, but for those that no distribution depends on. See ``Delivery.check``."""
    left_out = tuple(f"{module}." for module in absent)
    return sorted(
        weight
        for name, weights in sent.items()
        for weight in weights
        if weight not in placed and not NOT_SAMPLED_WITH.fullmatch(weight) and not (name or weight).startswith(left_out)
    )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)} in all)"
