"""On a GPU: the whole policy in bfloat16, compiled, checkpointed, sharded and with offloaded moments."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from pgrpo.admission.compare import reference_logprobs, tokens_as_samples
from pgrpo.attention.choose import AttentionChoice
from pgrpo.attention.kernels.flash import choose_kernel
from pgrpo.distributed.fsdp import place
from pgrpo.distributed.world import World, start
from pgrpo.model import recompute as layers
from pgrpo.model.policy import ATTENTION_NAME, Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.training import offload
from pgrpo.training.long_samples import set_up_long_samples
from pgrpo.training.offload import OffloadedAdamW
from pgrpo.training.optim import load_optimizer_shards, optimizer_shards

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
LAYERS = 4
CONFIG = transformers.Qwen3Config(
    vocab_size=5000, hidden_size=512, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=8,
    num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


def make_model(attention, dtype):
    torch.manual_seed(0)
    with GPU:
        return transformers.AutoModelForCausalLM.from_config(CONFIG, attn_implementation=attention, dtype=dtype).train()


def make_policy(recompute: layers.Recompute = "none", compiled=False, dtype=torch.bfloat16, way: Any = "auto"):
    model = make_model(ATTENTION_NAME, dtype)
    layers.set_up_layers(model.model.layers, [recompute for _ in range(LAYERS)], compiled=compiled)
    kernel = choose_kernel("auto", GPU, torch.bfloat16, 64)
    return Policy(model, attention=AttentionChoice(kernel.name, 8, 2, 64, way, reason=kernel.reason))


def groups(rnd):
    def ids(least, most):
        return [rnd.randrange(5000) for _ in range(rnd.randint(least, most))]

    prompts = [ids(2, 400) for _ in range(rnd.randint(1, 3))]
    return tokens_as_samples(prompts, [[ids(0, 200) for _ in range(rnd.randint(2, 6))] + [ids(9, 9)] for _ in prompts])


def batch_for(policy, rnd):
    return build_batch(Forest.of(groups(rnd)), device=GPU, attention=policy.attention)


def gradients(policy, batch):
    logprobs = policy(batch).logprobs
    return logprobs.detach(), torch.autograd.grad(logprobs.sum(), list(policy.parameters()))


def host_state(optimizer, module):
    return {name: shard.tensor.cpu().clone() for name, shard in optimizer_shards(optimizer, module).items()}


@pytest.mark.parametrize("way", ["between_depths", "copied_keys"])
@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_is_no_further_from_float32_than_the_untouched_model(compiled, way):
    samples = groups(random.Random(0))
    truth = reference_logprobs(make_model("sdpa", torch.float32), samples).detach()
    untouched = reference_logprobs(make_model("sdpa", torch.bfloat16), samples).detach()
    policy = make_policy(compiled=compiled, way=way)
    got = policy(build_batch(Forest.of(samples), device=GPU, attention=policy.attention)).logprobs.detach()
    ours, theirs = (got - truth).norm().item(), (untouched - truth).norm().item()
    print(f"compiled={compiled} {way}: grouped {ours:.3e}, untouched {theirs:.3e}, ratio {ours / theirs:.2f}")
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_compiled_and_checkpointed_gradients_agree_and_nothing_compiles_after_warm_up(recompute):
    torch._dynamo.reset()
    layers.compile_dynamic.cache_clear()
    plain, compiled, rnd = make_policy(), make_policy(recompute, compiled=True), random.Random(1)

    def compare(batch):
        got, wanted = gradients(compiled, batch), gradients(plain, batch)
        assert (got[0] - wanted[0]).norm() <= 0.02 * wanted[0].norm()
        error = sum((a - b).float().square().sum() for a, b in zip(got[1], wanted[1], strict=True))
        assert error <= 0.03**2 * sum(b.float().square().sum() for b in wanted[1])
        with torch.no_grad():
            assert (compiled(batch).logprobs - got[0]).norm() <= 0.02 * wanted[0].norm()

    compare(batch_for(compiled, rnd))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(20):
        compare(batch_for(compiled, rnd))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_checkpointing_attention_takes_less_memory_than_none_and_more_than_full():
    peaks = []
    for recompute in ("none", "attention", "full"):
        policy = make_policy(recompute, compiled=True)
        samples = tokens_as_samples([[7] * 4000], [[[8 + i] * 2000 for i in range(4)]])
        batch = build_batch(Forest.of(samples), device=GPU, attention=policy.attention)
        gradients(policy, batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(policy, batch)
        peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    print(f"MiB above the weights: none {peaks[0]:.0f}, attention {peaks[1]:.0f}, full {peaks[2]:.0f}")
    assert peaks[0] > 1.3 * peaks[1]
    assert peaks[1] > 1.05 * peaks[2]


@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_of_layers_wait_in_pinned_memory(compiled):
    """The gradients of ``full``, and less memory by the inputs of all layers but the one in use and the next; MLPs in parts."""
    found, peaks = [], []
    samples = tokens_as_samples([[7 + i % 900 for i in range(8000)]], [[[8 + i] * 2001 for i in range(4)]])
    ways: tuple[layers.Recompute, ...] = ("full", "offload")
    for recompute in ways:
        policy = make_policy(recompute, compiled=compiled)
        set_up_long_samples(
            policy.model.model.layers, [recompute for _ in range(LAYERS)], 3 if recompute == "offload" else 1
        )
        batch = build_batch(Forest.of(samples), device=GPU, attention=policy.attention)
        gradients(policy, batch)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(gradients(policy, batch))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    one_input = batch.packed_tokens * 512 * 2
    print(
        f"MiB above the weights: full {peaks[0] / 2**20:.0f}, offload {peaks[1] / 2**20:.0f}; an input {one_input / 2**20:.0f}"
    )
    assert peaks[0] - peaks[1] > one_input
    (logprobs, wanted), (others, got) = found
    assert (logprobs - others).norm() <= 0.01 * logprobs.norm()
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 0.03 * b.norm()


@pytest.mark.parametrize("sharded", [False, True])
def test_offloaded_adamw_is_bit_equal_to_fused_adamw(sharded, monkeypatch):
    """Also in pieces, also after its state was saved and put back."""
    monkeypatch.setattr(offload, "PIECE", 100_000)
    with start() as world:
        assert isinstance(world, World)
        policies = [make_policy(dtype=torch.float32) for _ in range(2)]
        if sharded:
            for policy in policies:
                place(policy, policy.model.model.layers, world, torch.bfloat16)
        settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        optimizers = [
            torch.optim.AdamW(policies[0].parameters(), **settings, fused=True),
            OffloadedAdamW([{"params": list(policies[1].parameters())}], **settings),
        ]
        for step in range(4):
            torch.manual_seed(step)
            noise = [torch.randn(p.shape, device=GPU) for p in policies[0].parameters()]
            for policy, optimizer in zip(policies, optimizers, strict=True):
                for p, g in zip(policy.parameters(), noise, strict=True):
                    p.grad = gradient = torch.zeros_like(p)
                    offload.local(gradient).copy_(g)
                optimizer.step()
            for a, b in zip(*(policy.parameters() for policy in policies), strict=True):
                assert torch.equal(offload.local(a), offload.local(b))
            if step == 1:
                saved = host_state(optimizers[1], policies[1])
                for name, tensor in host_state(optimizers[0], policies[0]).items():
                    assert torch.equal(tensor, saved[name]), name
                optimizers[1] = OffloadedAdamW([{"params": list(policies[1].parameters())}], **settings)
                load_optimizer_shards(optimizers[1], policies[1], saved, lambda name, _, saved=saved: saved[name])
        state = optimizers[1].state[next(policies[1].parameters())]
        assert SimpleNamespace(**state).exp_avg.is_pinned()


def test_sharded_compiled_policy_on_one_rank_equals_plain_bfloat16():
    """float32 masters gathered in bfloat16 compute what a bfloat16 copy computes."""
    with start() as world:
        policy, plain = make_policy("attention", compiled=True, dtype=torch.float32), make_policy()
        place(policy, policy.model.model.layers, world, torch.bfloat16)
        batch = batch_for(policy, random.Random(3))
        logprobs = policy(batch).logprobs
        logprobs.sum().backward()
        wanted_logprobs, wanted = gradients(plain, batch)
        assert (logprobs - wanted_logprobs).norm() <= 0.02 * wanted_logprobs.norm()
        grads = [offload.local(p.grad) for p in policy.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 for g in grads)
        error = sum((a - b).float().square().sum() for a, b in zip(grads, wanted, strict=True))
        assert error <= 0.03**2 * sum(b.float().square().sum() for b in wanted)
