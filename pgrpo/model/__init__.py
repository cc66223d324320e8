"""The policy: a transformers model with grouped attention that returns log-probs of completion tokens. Also activation
checkpointing, LoRA, its weights under checkpoint names, and the comparison with the untouched model. Begin with ``policy.py``.
"""
