"""Random forests of up to six depths on small models in float64, against the untouched model one sample a call; seeded bugs."""

import random

import pytest
import torch
from transformers import AutoConfig

from pgrpo.admission.compare import difference, gradients, reference_logprobs
from pgrpo.admission.seeded_bugs import SEEDED_BUGS
from pgrpo.admission.shrink import shrink
from pgrpo.admission.twins import True64, default_dtype
from pgrpo.admission.twins import twins as small_twins
from pgrpo.attention.choose import AttentionChoice
from pgrpo.model.policy import Policy
from pgrpo.packing.batch import build_batch
from pgrpo.packing.forest import Forest
from pgrpo.types import Sample

CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 8}
MODELS = {
    "qwen3": {},
    "gemma3_text": {"sliding_window": 4096},
    "gpt_oss": {},
    "qwen3_5_moe_text": {},
    "lfm2": {"num_hidden_layers": 16, **CONVOLUTIONS},
}


def random_samples(seed: int, depths: int = 6) -> list[Sample]:
    """Conversations that branch once or twice at each of ``depths`` turns; some end early, some are equal; masks with holes."""
    rnd = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rnd.randrange(3, 60) for _ in range(n)]

    paths = [ids(rnd.randint(1, 6)) for _ in range(2)]
    ended: list[list[int]] = []
    for _ in range(depths - 1):
        paths = [path + ids(rnd.randint(1, 5)) for path in paths for _ in range(rnd.randint(1, 2))]
        rnd.shuffle(paths)
        ended, paths = ended + paths[6:] + paths[:1], paths[:6]
    samples = []
    for path in paths + ended:
        prompt = rnd.randint(1, len(path))
        mask = [rnd.random() < 0.8 for _ in path[prompt:]]
        samples.append(Sample(path[:prompt], path[prompt:], mask, [0.0] * len(mask)))
    return samples


@pytest.fixture(scope="module", params=MODELS)
def twins(request):
    config = AutoConfig.for_model(request.param, **MODELS[request.param])
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float64):
        yield small_twins(shrink(config), 0)


@pytest.mark.parametrize(
    ("seed", "way", "least"), [(0, "between_depths", 1), (1, "copied_keys", 1), (2, "between_depths", 4)]
)
def test_a_random_forest_is_exact_in_float64(seed, way, least, twins):
    untouched, grouped = twins
    samples = random_samples(seed)
    forest = Forest.of(samples, least)
    with True64():
        policy = Policy(grouped, attention=AttentionChoice(way=way))
        batch = build_batch(forest, attention=policy.attention)
        wanted = reference_logprobs(untouched, samples)
        got = difference(policy, batch, wanted, gradients(wanted, untouched))
    assert least > 1 or batch.layout.nodes[-1].depth == (5, 4)[seed]  # six depths, and five
    assert got.logprob < 1e-12
    assert got.gradient < 1e-12


@pytest.mark.parametrize("bug", SEEDED_BUGS)
def test_a_bug_in_a_deep_forest_is_noticed(bug, twins):
    untouched, grouped = twins
    samples = random_samples(3)
    with True64(), torch.no_grad():
        policy = Policy(grouped)
        batch = SEEDED_BUGS[bug](build_batch(Forest.of(samples)))
        assert batch is not None
        wanted = reference_logprobs(untouched, samples)
        assert (policy(batch).logprobs - wanted).abs().max() > 1e-3
