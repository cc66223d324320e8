"""Samples with the policy's own transformers model, in the trainer's process; no weights are copied. Begin with ``engine.py``;
``cache.py`` holds keys and values (each prompt's once), ``sampling.py`` draws tokens.
"""
