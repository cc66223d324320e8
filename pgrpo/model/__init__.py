"""The policy: a transformers model whose attention is grouped, log-probs of completion tokens out of it, and what surrounds
it: recomputation, LoRA, the names of its weights, and the proof that it is exact. Begin with ``policy.py``.
"""
