"""The backend of shared decoding in vLLM's own classes, on a CPU: kernels in Triton's interpreter, FlashAttention not at all."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shared_decode import Batch, batch, exact

from pgrpo.rollout.vllm import start as vllm_start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the engine's tests run it"),
]
PAGE, HEADS, KEY_HEADS, DIM = 16, 4, 2, 64
GIVEN = batch([(300, [5, 9, 1]), (40, [3])], PAGE, pad=1)


@pytest.fixture
def backend(monkeypatch):
    vllm_start.package()
    from pgrpo.rollout.vllm import shared_backend

    made = []
    base = shared_backend.SharedImpl.__base__
    monkeypatch.setattr(base, "forward", lambda self, *given: made.append("plain"))
    return SimpleNamespace(module=shared_backend, plain=made)


def entry(kind, impl=None):
    """A layer as vLLM's list has it: of these kinds all but the experts keep something of a sequence."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers.mamba.gdn.base import GatedDeltaNetAttention  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.layers.mamba.short_conv import ShortConv  # pyright: ignore[reportMissingImports]

    bases = {
        "attention": AttentionLayerBase, "experts": MoERunner, "mamba": MambaMixer2, "gated delta net": GatedDeltaNetAttention,
        "short convolution": ShortConv,
    }  # fmt: skip
    fake: Any = type(f"Fake{bases[kind].__name__}", (bases[kind],), {})
    fake.__abstractmethods__ = frozenset()
    made = object.__new__(fake)
    if isinstance(made, torch.nn.Module):
        torch.nn.Module.__init__(made)
    if impl is not None:
        made.impl = impl
    return made


def builder(backend, **layer):
    """A builder for one layer of this kind, and the layer's own part."""
    shape = {"num_heads": HEADS, "head_size": DIM, "scale": DIM**-0.5, "num_kv_heads": KEY_HEADS, "alibi_slopes": None}
    impl = backend.module.SharedImpl(**shape | {"sliding_window": None, "kv_cache_dtype": "auto"} | layer)
    model = SimpleNamespace(
        get_num_attention_heads=lambda _: HEADS, get_num_kv_heads=lambda _: KEY_HEADS, get_head_size=lambda: DIM,
        rswa_window=None, is_mm_prefix_lm=False, max_model_len=256,
    )  # fmt: skip
    graphs = SimpleNamespace(has_full_cudagraphs=lambda: False)
    config = SimpleNamespace(
        model_config=model, cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(cp_kv_cache_interleave_size=1), attention_config=None,
        compilation_config=SimpleNamespace(
            cudagraph_mode=graphs, max_cudagraph_capture_size=0, static_forward_context={"layer": entry("attention", impl)}
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=8), kernel_config=SimpleNamespace(enable_jit_warmup=False),
    )  # fmt: skip
    from vllm.v1.kv_cache_interface import FullAttentionSpec  # pyright: ignore[reportMissingImports]

    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KEY_HEADS, head_size=DIM, dtype=torch.float32)
    return backend.module.SharedBuilder(spec, [], config, torch.device("cpu")), impl, config


def metadata(backend, given: Batch, queries: int = 1):
    """Of a batch with so many new tokens a sequence."""
    n = len(given.lengths)
    starts = queries * torch.arange(n + 1, dtype=torch.int32)
    return backend.module.CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=given.lengths, num_reqs=n, num_actual_tokens=n * queries,
        max_query_len=queries, max_seq_len=int(given.lengths.max()), block_table_tensor=given.table,
        slot_mapping=torch.zeros(n * queries, dtype=torch.int64),
    )  # fmt: skip


def test_a_decode_step_is_shared_and_a_prefill_is_vllms_own(backend):
    torch.manual_seed(0)
    made, impl, config = builder(backend)
    assert backend.module.why_not(config) is None
    n = len(GIVEN.lengths)
    cache = torch.randn(int(GIVEN.table.max()) + 1, KEY_HEADS, PAGE, 2 * DIM)
    q, out = torch.randn(n + 3, HEADS, DIM), torch.full((n + 3, HEADS, DIM), 7.0)
    built = made.build(0, metadata(backend, GIVEN))
    impl.forward(None, q, None, None, cache, built, out)
    keys, values = cache.transpose(1, 2).split(DIM, dim=-1)
    torch.testing.assert_close(out[:n].double(), exact(q, keys, values, GIVEN, list(range(n))), atol=1e-5, rtol=0)
    assert (out[n:] == 7).all() and not backend.plain
    assert made.layout.members[:n].tolist() == [3, 0, 0, 1, 1]
    for other in (made.build(0, metadata(backend, GIVEN, queries=2)), made.build(16, metadata(backend, GIVEN)), None):
        impl.forward(None, q, None, None, cache, other, out)
    assert backend.plain == ["plain"] * 3


def test_a_batch_above_the_arrays_is_decoded_plainly(backend):
    made, *_ = builder(backend)
    assert made.build(0, metadata(backend, batch([(40, [1] * 9)], PAGE))).shared_layout is None


@pytest.mark.parametrize(
    ("layer", "reason"), [({"sliding_window": 128}, "a layer has a sliding window"), ({"head_size": 96}, "head dim 96")]
)
def test_a_model_with_a_layer_that_cannot_is_decoded_plainly(backend, layer, reason):
    made, _, config = builder(backend, **layer)
    assert reason in backend.module.why_not(config)
    assert made.layout is None and made.build(0, metadata(backend, GIVEN)).shared_layout is None
    config.compilation_config.static_forward_context["layer"] = entry("attention", "FlashInferImpl")
    assert backend.module.why_not(config) == "layer is computed by str, not by FlashAttention"


def test_heads_are_the_layers_own_and_the_same_in_all(backend):
    """A config may list them by layer, and tell another number for the model."""
    made, _, config = builder(backend, num_heads=3 * KEY_HEADS)
    assert made.layout.heads == 3 * KEY_HEADS
    config.compilation_config.static_forward_context["other"] = entry("attention", builder(backend)[1])
    assert backend.module.why_not(config) == "layers have unlike heads"


def test_a_model_whose_completions_have_a_window_is_decoded_plainly(backend):
    *_, config = builder(backend)
    config.model_config.rswa_window = 128
    assert "a window" in backend.module.why_not(config)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("experts", None),
        ("mamba", "MambaMixer2"),
        ("gated delta net", "GatedDeltaNetAttention"),
        ("short convolution", "ShortConv"),
    ],
)
def test_experts_play_no_part_and_states_do(backend, kind, layer):
    made, _, config = builder(backend)
    config.compilation_config.static_forward_context["other"] = entry(kind)
    reason = layer and f"other is computed by Fake{layer}, not by FlashAttention"
    assert backend.module.why_not(config) == reason
    again = type(made)(made.kv_cache_spec, [], config, torch.device("cpu"))
    assert (again.layout is None) == (reason is not None)


def test_an_engine_that_starts_meanwhile_has_this_backend_and_others_have_vllms(backend, monkeypatch):
    """Others of the same process, whose layers are of the same kind."""
    import vllm.platforms as platforms  # pyright: ignore[reportMissingImports]
    from vllm.v1.attention import selector  # pyright: ignore[reportMissingImports]

    flash_attn = backend.module.AttentionBackendEnum.FLASH_ATTN
    gpu = SimpleNamespace(get_attn_backend_cls=lambda *_, **__: flash_attn.get_path())
    monkeypatch.setattr(platforms, "_current_platform", gpu)

    def chosen():
        return selector._cached_get_attn_backend(None, "layers of a kind")

    own = backend.module.SharedBackend.__base__
    assert chosen() is own
    with backend.module.registered(4):
        assert chosen() is backend.module.SharedBackend
        assert chosen().get_name() == "FLASH_ATTN"
    assert chosen() is own
