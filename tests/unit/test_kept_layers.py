"""Which layers of a config are kept for a proof: one of every kind that its values tell apart, in their order."""

from typing import Any

import pytest

from pgrpo.admission.kinds import keep_every_kind


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"num_hidden_layers": 12}, {"num_hidden_layers": 2}),
        ({"num_hidden_layers": 12, "sliding_window_pattern": 6}, {"num_hidden_layers": 6, "sliding_window_pattern": 6}),
        ({"num_hidden_layers": 12, "rope_interval": 6}, {"num_hidden_layers": 2, "rope_interval": 6}),
        (
            {"num_hidden_layers": 4, "layer_types": ["a", "a", "b", "a"], "n_layers": 4},
            {"num_hidden_layers": 2, "layer_types": ["a", "b"], "n_layers": 2},
        ),
        ({"num_hidden_layers": 4, "moe_layers": [1, 3]}, {"num_hidden_layers": 2, "moe_layers": [1]}),
        ({"num_hidden_layers": 4, "heads": {"2": 7}}, {"num_hidden_layers": 2, "heads": {1: 7}}),
        ({"num_hidden_layers": 8, "first_k_dense_replace": 3}, {"num_hidden_layers": 3, "first_k_dense_replace": 1}),
        ({"num_hidden_layers": 1, "layer_types": ["a"]}, {"num_hidden_layers": 1, "layer_types": ["a"]}),
    ],
)
def test_one_layer_of_every_kind_is_kept(values: dict[str, Any], kept: dict[str, Any]):
    keep_every_kind(values)
    assert values == kept
