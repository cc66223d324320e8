"""On a GPU: what leaves while vLLM samples is copied beside other work, behind what wrote it."""

import pytest
import torch

from pgrpo.rollout.vllm import offload
from pgrpo.rollout.vllm.offload import Offload

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
CYCLES = 100_000_000
"""About a twentieth of a second, which the stream waits: all copies are given to the GPU meanwhile."""


@pytest.mark.parametrize("staying", [0, 100 * 2**20])
def test_tensors_come_back_as_they_were_last_written_and_their_memory_is_free_meanwhile(monkeypatch, staying):
    monkeypatch.setattr(offload, "PIECE", 3 * 2**20)
    tensors = [torch.zeros(16 * 2**18 + i, device=GPU) for i in range(12)]  # 16 MiB each
    moved, read = Offload(lambda: tensors, staying), []
    for step in range(3):  # buffers and storages are used again
        torch.cuda._sleep(CYCLES)
        for i, tensor in enumerate(tensors):
            tensor.fill_(100 * step + i)
        before = torch.cuda.memory_allocated(GPU)
        with moved.away(lambda: read.append([tensor.sum(dtype=torch.float64) for tensor in tensors])):
            freed = before - torch.cuda.memory_allocated(GPU)
            assert 12 * 16 * 2**20 - staying - 2**20 <= freed <= 12 * 17 * 2**20
            other = torch.full((freed // 4,), -1.0, device=GPU)  # is where they were
        del other
        for i, tensor in enumerate(tensors):
            expected = torch.full_like(tensor, 100 * step + i)
            assert torch.equal(tensor, expected) and read[step][i] == expected.sum(dtype=torch.float64)
