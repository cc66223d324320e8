"""The policy: a transformers model with grouped attention that returns log-probs of completion tokens. Also activation
checkpointing, LoRA, and its weights under checkpoint names. Begin with ``policy.py``.
"""
