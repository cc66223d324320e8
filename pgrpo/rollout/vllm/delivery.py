"""Checks that all weights of a push arrived in the engine, by names and checksums."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

EXPERT = re.compile(
    r"(?P<layer>.+\.experts\.)\d+\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>weight|bias)"
)


class DeliveryError(RuntimeError):
    """After a push the engine does not have all of the policy's weights."""


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
        rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
        ranks: int = 1,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """A collective call of the ranks that share an engine.

        Args:
            names: all names that must be sent.
            written: names of the engine's parameters that it reports as written, or those that ``in_checkpoint`` gives them.
            parameters: the engine's parameters on this rank. Empty ones cannot be read back and are not compared.
            fused: fused parameter -> its sources, as ``qkv_proj`` -> ``[q_proj, k_proj, v_proj]``.
            rename: gives keys the names that the engine has for them, before it fuses (``model.embedding`` of gpt-oss), and adds
                up those of one name.
            ranks: number of ranks that share the engine. Each has a part of a parameter, or all of it.
            sum_over_ranks: sums an int64 tensor over these ranks.

        Raises:
            DeliveryError: a name was not sent, is unknown or was not written, or a checksum differs.
        """
        if differing := sorted(names ^ self.sent.keys()):
            raise DeliveryError(f"weight push: {_some(differing)} were not sent, or are not the policy's")
        if missing := sorted(name for name in parameters if not written & {name, in_checkpoint(name)}):
            raise DeliveryError(f"weight push: the engine did not load {_some(missing)}")
        sent = rename(self.sent)
        sizes = rename({name: torch.tensor(size) for name, size in self.sizes.items()})
        experts, place = sources_of_experts(sent), {name: i for i, name in enumerate(sent)}
        compared: list[str] = []
        found: list[Tensor] = []
        terms: list[tuple[int, int, int]] = []  # of the sums that are wanted: compared, sent, copies
        for name, parameter in parameters.items():
            if not parameter.numel():
                continue
            of_experts = in_checkpoint(name)
            sources = [of_experts] if of_experts in sent else experts.get(of_experts) or sources_of(name, fused)
            if any(source not in sent for source in sources):
                raise DeliveryError(
                    f"weight push: the engine's {name} is made of {sources}, which the policy does not have"
                )
            # A parameter that is whole on each rank is counted once a rank. Zero padding (of a vocabulary) adds nothing, and biases
            # of experts' down projections are zero on all ranks but the first.
            is_whole = parameter.numel() >= sum(int(sizes[source]) for source in sources)
            copies = ranks if is_whole and not name.endswith("experts.w2_bias") else 1
            terms += [(len(compared), place[source], copies) for source in sources]
            compared.append(name)
            found.append(bit_sum(parameter))
        sums, own = torch.stack([*sent.values()]), torch.stack(found)
        rows, columns, copies = torch.tensor(terms, device=own.device).unbind(1)  # one tensor: each copy to a GPU waits
        wanted = torch.zeros_like(own).index_add_(0, rows, copies * sums[columns])
        unequal = (sum_over_ranks(own) != wanted).tolist()
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
    return found


def added_up(rename: Callable[[dict[str, Tensor]], dict[str, Tensor]], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """``values`` under their new names; those that get the same name (parts of a fused parameter) are added up."""
    found: dict[str, Tensor] = {}
    for name, value in values.items():
        for new, renamed in rename({name: value}).items():
            found[new] = found[new] + renamed if new in found else renamed
    return found


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)} in all)"
