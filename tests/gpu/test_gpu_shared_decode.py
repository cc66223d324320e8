"""On a GPU: decode attention that reads shared keys once, alone and in a captured graph, against float64."""

import pytest
import torch
from shared_decode import Batch, batch, exact

from pgrpo.rollout.vllm.shared_layout import DecodeLayout

pytestmark = pytest.mark.gpu
N = 64
BATCHES = {
    "equal groups": batch([(2048, [300] * 8)] * 8, 16),
    "all kinds of groups": batch(
        [(2000, [9] * 20), (700, [1, 500]), (17, [3]), (1040, [40] * 7), (600, [200] * 16)], 16, pad=18, mixed=True
    ),
    "behind a system prompt": batch([(1500 + 10 * i, [20 * i + 1] * 6) for i in range(10)], 16, system=512, pad=4),
    "nothing in common": batch([(100 + 70 * i, [5]) for i in range(64)], 16),
    "one sequence": batch([(30_000, [2000])], 16, pad=63),
}


def test_completions_of_a_prompt_are_found_in_any_order():
    """10 groups of 6, shuffled, behind a system prompt."""
    groups = [(1500 + 10 * i, [20 * i + 1] * 6) for i in range(10)]
    given = on_gpu(batch(groups, 16, system=512, pad=4, mixed=True), 128)
    made = DecodeLayout(N, 32, 8, 128, 16, given.table.device, 16 * 128)
    made.update(*given)
    assert made.members[made.members > 0].tolist() == [6] * 10 + [1] * 4
    assert set(made.shared.tolist()) == {0} | {(1499 + 10 * i) // 16 * 16 for i in range(10)}


def on_gpu(given: Batch, width: int) -> Batch:
    table = torch.zeros(N, width, dtype=torch.int32)
    table[:, : given.table.shape[1]] = given.table
    return Batch(table.cuda(), given.lengths.cuda())


def tensors(heads, dtype, layout):
    """Queries, keys and values of a cache in one of vLLM's two layouts, for every batch above."""
    blocks = 1 + max(int(given.table.max()) for given in BATCHES.values())
    query_heads, key_heads, dim = heads
    shape = (blocks, 16, key_heads, 2 * dim) if layout == "NHD" else (blocks, key_heads, 16, 2 * dim)
    cache = torch.randn(shape, device="cuda", dtype=dtype)
    keys, values = (cache if layout == "NHD" else cache.transpose(1, 2)).split(dim, dim=-1)
    return 2 * torch.randn(N, query_heads, dim, device="cuda", dtype=dtype), keys, values


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(32, 8, 128), (14, 2, 64), (16, 16, 128)], ids=str)
def test_a_captured_graph_computes_whatever_batch_is_in_place(heads, dtype, layout):
    """To the rounding of the output, which is all that the kernels' error may be."""
    torch.manual_seed(0)
    q, keys, values = tensors(heads, dtype, layout)
    width = max(given.table.shape[1] for given in BATCHES.values())
    query_heads, key_heads, dim = heads
    made, out = DecodeLayout(N, query_heads, key_heads, dim, 16, q.device, 16 * width), torch.empty_like(q)
    place = on_gpu(BATCHES["equal groups"], width)

    def attend():
        made.attend(q, keys, values, out, dim**-0.5)

    made.update(*place)
    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()
    for name, given in BATCHES.items():
        for array, value in zip(place, on_gpu(given, width), strict=True):
            array.copy_(value)
        for array in vars(made).values():  # as after sleep
            if isinstance(array, torch.Tensor):
                array.fill_(float("nan") if array.is_floating_point() else -77)
        q.normal_().mul_(2)
        out.fill_(float("nan"))
        made.update(*place)
        graph.replay()
        rows = list(range(N)) if name != "one sequence" else [0, 1]
        truth = exact(q, keys, values, place, rows)
        error, rounding = ((x.double() - truth).norm() for x in (out[rows], truth.to(dtype)))
        print(f"{name}: {error / truth.norm():.1e}, rounding {rounding / truth.norm():.1e}")
        assert error <= 1.05 * rounding, name
        assert torch.isfinite(out).all()
        again = out.clone()
        graph.replay()
        assert torch.equal(again, out), "equal calls give equal results"
