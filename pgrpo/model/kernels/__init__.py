"""Triton kernels of the model's own operations, one file for each. ``logits.py``: log-probs, entropy, KL and their gradient in one
pass over a chunk of logits; ``logit_rows.py`` is its specification.
"""
