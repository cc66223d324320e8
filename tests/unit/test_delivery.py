"""What a weight push must notice, with an engine of two ranks that fuses, splits and pads."""

import re
from typing import Any

import pytest
import torch

from pgrpo.rollout.vllm.delivery import Delivery, DeliveryError, bit_sum, sources_of
from pgrpo.rollout.vllm.loading import reported, sinks_aside, take_halves

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def weights(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (10, 4), "a.q_proj.weight": (8, 4), "a.k_proj.weight": (4, 4), "a.v_proj.weight": (4, 4)}
    shapes |= {"a.o_proj.weight": (4, 8), "norm.weight": (4,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def engine(given, ranks):
    """Each rank's parameters: rows of q, k, v by rank and fused, columns of o, the vocabulary padded to 12, the norm on all."""
    fused = [
        torch.cat([given[f"a.{n}_proj.weight"].chunk(ranks)[rank] for n in "qkv"])
        for rank in range(ranks)
    ]  # fmt: skip
    padded = torch.cat([given["embed.weight"], torch.zeros(2, 4, dtype=given["embed.weight"].dtype)])
    return [
        {
            "embed.weight": padded.chunk(ranks)[rank],
            "a.qkv_proj.weight": fused[rank],
            "a.o_proj.weight": given["a.o_proj.weight"].chunk(ranks, dim=1)[rank],
            "norm.weight": given["norm.weight"].clone(),
        }
        for rank in range(ranks)
    ]


def push(sent, parts, *, names=None, written=None, **more):
    delivery = Delivery(sent.items())
    assert dict(delivery).keys() == sent.keys()
    sums = [torch.stack([bit_sum(p) for p in part.values() if p.numel()]) for part in parts]
    delivery.check(
        set(names or weights()),
        set(written or parts[0]),
        parts[0],
        FUSED,
        ranks=len(parts),
        sum_over_ranks=lambda own: (
            torch.stack(sums).sum(0) if torch.equal(own, sums[0]) else pytest.fail("another order")
        ),
        **more,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_whole_push_passes_and_each_wrong_element_is_noticed(ranks, dtype):
    sent = weights(dtype)
    push(sent, engine(sent, ranks))
    for name in sent:
        stale = {n: t.clone() for n, t in sent.items()}
        stale[name].view(-1)[1] += 0.5
        fused = "a.qkv_proj.weight" if "q_proj" in name or "k_proj" in name or "v_proj" in name else name
        with pytest.raises(DeliveryError, match=rf"checksums of {fused} \(1 in all\)"):
            push(sent, engine(stale, ranks))


def test_a_tensor_that_was_not_sent_not_loaded_or_is_not_the_policys_is_named():
    sent = weights()
    parts = engine(sent, 1)
    dropped = {n: t for n, t in sent.items() if n != "a.k_proj.weight"}
    with pytest.raises(DeliveryError, match=r"a\.k_proj\.weight \(1 in all\) were not sent"):
        push(dropped, parts)
    with pytest.raises(DeliveryError, match=r"other \(1 in all\) were not sent, or are not the policy's"):
        push(sent | {"other": sent["norm.weight"]}, parts)
    with pytest.raises(DeliveryError, match=r"did not load norm\.weight"):
        push(sent, parts, written=set(parts[0]) - {"norm.weight"})
    with pytest.raises(DeliveryError, match=r"is made of .*extra.*which the policy does not have"):
        push(sent, [parts[0] | {"extra": sent["norm.weight"]}])
    push(sent, [parts[0] | {"a.o_proj.weight": torch.empty(0)}])  # cannot be read back


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_weight_that_the_engine_has_no_place_for_is_named(ranks):
    """As Qwen3 with attention_bias, whose o_proj has none in vLLM."""
    sent = weights()
    parts, bias = engine(sent, ranks), {"a.o_proj.bias": torch.ones(4), "a.q_proj.bias": torch.ones(8)}
    ignored = r"no place for a\.o_proj\.bias, a\.q_proj\.bias \(2 in all\): .* Set rollout\.engine=embedded, or"
    for rename in (lambda name: name, lambda name: None if name.endswith("bias") else name):
        with pytest.raises(DeliveryError, match=ignored):
            push(sent | bias, parts, names=sent | bias, rename=rename)
    alias = {"lm_head.weight": sent["embed.weight"]}
    with pytest.raises(DeliveryError, match=r"no place for lm_head\.weight \(1 in all\)"):
        push(sent | alias, parts, names=sent | alias)


def test_an_engine_may_leave_out_what_no_distribution_depends_on():
    sent = weights()
    parts, one = engine(sent, 1), torch.ones(2)
    others = dict.fromkeys(("mtp.fc.weight", "model.mtp_layers.0.q.weight", "l.rotary_emb.inv_freq"), one)
    push(sent | others, parts, names=sent | others)
    tower = {"model.visual.blocks.0.weight": one}
    with pytest.raises(DeliveryError, match=r"no place for model\.visual\.blocks\.0\.weight \(1 in all\)"):
        push(sent | tower, parts, names=sent | tower, absent=["vis"])
    push(sent | tower, parts, names=sent | tower, absent=["visual"], rename=lambda name: name.removeprefix("model."))
    scalar, written = {"layer.scalar": one[:1]}, {*parts[0], "layer.scalar"}
    push(sent | scalar, parts, names=sent | scalar, written=written, buffers=["layer.scalar"])
    for told in ({"written": written}, {"buffers": ["layer.scalar"]}):
        with pytest.raises(DeliveryError, match=r"no place for layer\.scalar \(1 in all\)"):
            push(sent | scalar, parts, names=sent | scalar, **told)


def test_what_an_engine_ignores_is_not_guessed_where_it_packs_weights_of_other_names():
    """On a CPU, of a model that fuses under names that it does not tell."""
    sent, empty = weights(), torch.empty(0)
    bias = {"a.o_proj.bias": torch.ones(4)}
    parts = [{name: x for name, x in engine(sent, 1)[0].items() if "qkv" not in name}]
    push(sent, [parts[0] | {"a.c_attn.weight": empty}])
    push(sent | bias, [parts[0] | {"a.c_attn.weight": empty}], names=sent | bias)
    with pytest.raises(DeliveryError, match=r"no place for a\.o_proj\.bias \(1 in all\)"):
        push(sent | bias, [parts[0] | {"a.qkv_proj.weight": empty}], names=sent | bias)


@pytest.mark.parametrize(("up", "gate", "down"), [("up_proj", "gate_proj", "down_proj"), ("w3", "w1", "w2")])
@pytest.mark.parametrize(
    ("around", "reported"), [("", ""), ("routed_experts.", "routed_experts."), ("routed_experts.", "")]
)
def test_every_expert_is_in_the_engines_stacks(up, gate, down, around, reported):
    """``reported``: vLLM 0.26 names what it wrote to these stacks without the module that they are in."""
    generator = torch.Generator().manual_seed(1)
    names = [
        f"l.{layer}.experts.{i}.{part}.weight" for layer in range(2) for i in range(3) for part in (gate, up, down)
    ]
    sent = {name: torch.randn(4, 4, generator=generator) for name in names} | {
        "l.0.q.weight": torch.ones(2),
        "l.0.k.weight": torch.ones(1),
    }

    def stacks(given):
        found = {"l.0.qk.weight": torch.cat([given["l.0.q.weight"], given["l.0.k.weight"]])}
        for layer in range(2):
            own = [given[f"l.{layer}.experts.{i}.{part}.weight"] for i in range(3) for part in (gate, up, down)]
            found[f"l.{layer}.experts.{around}w13_weight"] = torch.stack([x for i, x in enumerate(own) if i % 3 < 2])
            found[f"l.{layer}.experts.{around}w2_weight"] = torch.stack(own[2::3])
        return found

    def rename(name):
        """As an engine that names fused parameters itself."""
        return name.replace(".q.", ".qk.").replace(".k.", ".qk.")

    def check(sent, engine, unwritten=None):
        delivery = Delivery(sent.items())
        assert dict(delivery).keys() == sent.keys()
        written = {name.replace(around, reported) if around else name for name in engine if name != unwritten}
        delivery.check(set(names) | sent.keys(), written, engine, {}, rename=rename)

    check(sent, stacks(sent))
    for name in stacks(sent):
        with pytest.raises(DeliveryError, match=rf"the engine did not load {re.escape(name)} \(1 in all\)"):
            check(sent, stacks(sent), unwritten=name)
    for name in sent:
        stale = {n: t.clone() for n, t in sent.items()}
        stale[name].view(-1)[0] += 0.5
        with pytest.raises(DeliveryError, match=r"checksums of l\.[01]\..* \(1 in all\)"):
            check(sent, stacks(stale))
    with pytest.raises(DeliveryError, match=rf"l\.1\.experts\.2\.{up}\.weight \(1 in all\) were not sent"):
        check({n: t for n, t in sent.items() if n != f"l.1.experts.2.{up}.weight"}, stacks(sent))


@pytest.mark.parametrize("ranks", [1, 2])
def test_sinks_of_gpt_oss_go_to_the_ranks_of_their_heads_and_biases_of_experts_to_the_first(ranks):
    generator = torch.Generator().manual_seed(2)
    sent = {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"l.sinks": (4,), "l.experts.down_proj_bias": (3, 2), "l.norm": (2,)}.items()
    }

    def rename(name):
        return name.replace("down_proj", "w2").replace("l.sinks", "l.attn.sinks")

    class Engine(torch.nn.Module):
        """One rank's, with sinks of its heads, and vLLM's way with the bias."""

        def __init__(self, rank):
            super().__init__()
            self.rank, self.l = rank, torch.nn.Module()
            self.l.attn, self.l.norm = torch.nn.Module(), torch.nn.Parameter(torch.zeros(2))
            self.l.attn.sinks = torch.nn.Parameter(torch.zeros(4 // ranks))
            loader: Any = self.l.attn.sinks
            loader.weight_loader = lambda parameter, value: parameter.data.copy_(value)
            self.l.experts = torch.nn.Module()
            self.l.experts.w2_bias = torch.nn.Parameter(torch.zeros(3, 2))

        def load(self, weights):
            for name, value in weights:
                if "bias" in name and self.rank:
                    value.zero_()
                self.get_parameter(rename(name)).data.copy_(value)

    engines, deliveries = [Engine(rank) for rank in range(ranks)], [Delivery(sent.items()) for _ in range(ranks)]
    before = {name: value.clone() for name, value in sent.items()}
    for rank, (engine, delivery) in enumerate(zip(engines, deliveries, strict=True)):
        written = set()
        engine.load(sinks_aside(engine, iter(delivery), rename, rank, written))
        assert written == {"l.attn.sinks"}
    assert all(torch.equal(value, before[name]) for name, value in sent.items())
    assert torch.equal(torch.cat([engine.get_parameter("l.attn.sinks") for engine in engines]), sent["l.sinks"])

    def check():
        parts = [dict(engine.named_parameters()) for engine in engines]
        sums = torch.stack([torch.stack([bit_sum(p) for p in part.values()]) for part in parts]).sum(0)
        names = set(parts[0])
        deliveries[0].check(set(sent), names, parts[0], {}, rename=rename, ranks=ranks, sum_over_ranks=lambda own: sums)

    check()
    for name in ("l.attn.sinks", "l.experts.w2_bias", "l.norm"):
        at = engines[0].get_parameter(name).data.view(-1)
        whole = at.clone()
        at[0] += 0.5
        with pytest.raises(DeliveryError, match=rf"checksums of {name} \(1 in all\)"):
            check()
        at.copy_(whole)


class Latent(torch.nn.Module):
    """Latent attention as vLLM has it: a projection that two modules hold, and its halves of each head, transposed."""

    def __init__(self, weight_OE, keys=3, values=2):
        super().__init__()
        self.core = torch.nn.Module()
        self.core.kv_b_proj = self.kv_b_proj = torch.nn.Linear(*weight_OE.T.shape, bias=False)
        self.kv_b_proj.weight = torch.nn.Parameter(weight_OE)
        keys_NPL, values_NVL = weight_OE.view(-1, keys + values, weight_OE.shape[1]).split([keys, values], dim=1)
        self.core.W_UK_T = torch.nn.Parameter(keys_NPL.contiguous())
        self.core.W_UV = torch.nn.Parameter(values_NVL.mT.contiguous())


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_both_halves_of_a_projection_of_latent_attention_are_compared_with_it(ranks, is_packed):
    sent = {"a.kv_b_proj.weight": torch.randn(20, 4, generator=torch.Generator().manual_seed(0))}

    def arrived(change=lambda latent: None):
        found = []
        for rank, part in enumerate(sent["a.kv_b_proj.weight"].chunk(ranks)):
            latent = Latent(part)
            if is_packed:
                latent.kv_b_proj.weight.data = torch.empty(0)
            if rank == ranks - 1:
                change(latent)
            model = torch.nn.ModuleDict({"a": latent})
            parameters = reported(model, {"a.kv_b_proj.weight"})
            found.append((parameters, take_halves(model, parameters)))
        delivery = Delivery(sent.items())
        assert dict(delivery).keys() == sent.keys()
        every = [[*parts.values(), *(x for _, x in halves.values())] for parts, halves in found]
        total = torch.stack([torch.stack([bit_sum(x) for x in of if x.numel()]) for of in every]).sum(0)
        delivery.check(
            {*sent}, {*sent}, found[0][0], {}, derived=found[0][1], ranks=ranks, sum_over_ranks=lambda _: total
        )
        return found[0]

    parameters, derived = arrived()
    assert [*parameters] == ["a.kv_b_proj.weight"]
    assert {name: of for name, (of, _) in derived.items()} == {"a.core.W_UK_T and W_UV": "a.kv_b_proj.weight"}
    for half in ("W_UK_T", "W_UV"):
        with pytest.raises(DeliveryError, match=r"checksums of a\.core\.W_UK_T and W_UV \(1 in all\)"), torch.no_grad():
            arrived(lambda model, half=half: getattr(model.core, half)[0, 1, 0].add_(1e-3))


def test_experts_that_are_sent_as_stacks_are_compared_as_stacks():
    """Granite's: vLLM reads them under the names that transformers has."""
    sent = {"moe.experts.gate_up_proj": torch.randn(2, 6, 4), "moe.experts.down_proj": torch.randn(2, 4, 3)}
    around = "moe.experts.routed_experts."
    stacks = {
        f"{around}w13_weight": sent["moe.experts.gate_up_proj"],
        f"{around}w2_weight": sent["moe.experts.down_proj"],
    }
    push(sent, [stacks], names={*sent})
    for name in stacks:
        wrong = stacks | {name: stacks[name] + 1}
        with pytest.raises(DeliveryError, match=rf"checksums of {re.escape(name)} \(1 in all\)"):
            push(sent, [wrong], names={*sent})


def test_a_parameter_of_two_names_has_the_one_that_was_written():
    shared = torch.nn.Linear(2, 2)
    block = torch.nn.ModuleDict({"runner": torch.nn.ModuleDict({"shared": shared}), "shared": shared})
    names = {"shared.weight", "shared.bias"}
    assert reported(block, names).keys() == names
    assert reported(block, {"runner.shared.weight"}).keys() == {"runner.shared.weight", "runner.shared.bias"}
    assert reported(block, {"runner.shared.weight", *names}).keys() == {"runner.shared.weight", "shared.bias"}
    assert all(parameter is getattr(shared, name.split(".")[1]) for name, parameter in reported(block, names).items())


def test_bit_sums_are_of_bits():
    assert bit_sum(torch.tensor([1.0, -0.0])).item() == 0x3F800000 - 2**31
    numbers = torch.tensor([1.0, -2.0, 3.0])
    assert bit_sum(numbers.bfloat16()) == bit_sum(numbers) != bit_sum(-numbers)
    assert sources_of("l.0.qkv_proj.bias", FUSED) == ["l.0.q_proj.bias", "l.0.k_proj.bias", "l.0.v_proj.bias"]
    assert sources_of("norm.weight", FUSED) == ["norm.weight"]
