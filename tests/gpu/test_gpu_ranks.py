"""On several GPUs over NCCL: the loss and the gradient are those of one GPU."""

import pytest
import torch
import transformers

pytestmark = pytest.mark.gpu


def gradient(result):
    return torch.cat([g.double().flatten() for _, g in sorted(result["gradients"].items())])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=61, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.timeout(600)
def test_an_update_on_several_gpus_equals_that_on_one(on_ranks, model, copies):
    """The weights sharded over all GPUs, and two copies of them, each on a half of the GPUs (hybrid sharding)."""
    ranks, changes = torch.cuda.device_count(), {"dtype": "bfloat16", "token_budget": 100, "compile": False}
    if ranks % copies:
        pytest.skip(f"{ranks} GPUs do not hold {copies} copies")
    sharded = {"fsdp_size": ranks // copies} if copies > 1 else {}
    one, several = on_ranks(model, 1, **changes), on_ranks(model, ranks, **sharded, **changes)
    other_cut = on_ranks(model, 1, **changes | {"token_budget": 300})

    def error(result):
        return ((gradient(result) - gradient(one)).norm() / gradient(one).norm()).item()

    print(f"{ranks} GPUs, {copies} copies: loss {several['sums']['loss']:.6f} against {one['sums']['loss']:.6f} on one")
    print(
        f"relative gradient error {error(several):.1e}; the same micro-batches cut otherwise on one: {error(other_cut):.1e}"
    )
    assert several["sums"]["tokens"] == one["sums"]["tokens"] > 100
    assert several["sums"]["loss"] == pytest.approx(one["sums"]["loss"], rel=1e-2, abs=1e-4)
    assert several["held"] == pytest.approx(one["held"] * copies / ranks, rel=0.02)
    # No more than what another order of bfloat16 operations does on one GPU.
    assert error(several) <= 2 * error(other_cut) < 0.05
