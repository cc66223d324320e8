"""Did every tensor arrive? Names and bits of a weight push, at the sender and in the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


class DeliveryError(RuntimeError):
    """A push did not bring the engine all of the policy's weights."""


class Delivery:
    """What one push sends, noted on its way: iterate it once, as (Hugging Face name, tensor)."""

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
        ranks: int = 1,
        sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        """A collective call of the ranks that share an engine.

        Args:
            names: all that had to be sent.
            written: names of its own parameters that the engine says it wrote.
            parameters: the engine's own, on this rank; an empty one cannot be read back, and is not compared.
            fused: what it makes one parameter of: ``qkv_proj`` of ``[q_proj, k_proj, v_proj]``.
            ranks: how many share the engine, a parameter split or whole on each.
            sum_over_ranks: adds an int64 tensor up over them.

        Raises:
            DeliveryError: a name was not sent, is unknown or was not written, or an engine's parameter has other bits.
        """
        if differing := sorted(names ^ self.sent.keys()):
            raise DeliveryError(f"weight push: {_some(differing)} were not sent, or are not the policy's")
        if missing := sorted(parameters.keys() - written):
            raise DeliveryError(f"weight push: the engine did not load {_some(missing)}")
        compared, wanted, found = [], [], []
        for name, parameter in parameters.items():
            if not parameter.numel():
                continue
            sources = [name] if name in self.sent else sources_of(name, fused)
            if any(source not in self.sent for source in sources):
                raise DeliveryError(
                    f"weight push: the engine's {name} is made of {sources}, which the policy does not have"
                )
            # Split over the ranks, or whole on each and then counted that many times. Padding (of a vocabulary) adds no bits.
            copies = ranks if parameter.numel() >= sum(self.sizes[source] for source in sources) else 1
            compared.append(name)
            wanted.append(copies * torch.stack([self.sent[source] for source in sources]).sum())
            found.append(bit_sum(parameter))
        unequal = (sum_over_ranks(torch.stack(found)) != torch.stack(wanted)).tolist()
        if wrong := [name for name, differs in zip(compared, unequal, strict=True) if differs]:
            raise DeliveryError(f"weight push: checksums of {_some(wrong)} are not those of the policy")


def bit_sum(tensor: Tensor) -> Tensor:
    """Sum of the elements' bit patterns as integers, a 0-d int64 tensor: the same in any order and any cut; zeros add nothing."""
    integer = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer).sum(dtype=torch.int64)


def sources_of(name: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
    """Checkpoint names of what an engine fuses into a parameter: ``...qkv_proj.weight`` is made of q, k and v."""
    for whole, parts in fused.items():
        if f".{whole}." in name:
            return [name.replace(f".{whole}.", f".{part}.") for part in parts]
    return [name]


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)} in all)"
