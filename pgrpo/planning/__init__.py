"""Predicts the cost of a step before it runs: FLOPs (``flops.py``) and GPU memory (``memory.py``). ``placement.py`` uses both
to choose kernel, compilation and activation checkpointing; ``hub.py`` reads a model's config, ``dims.py`` its sizes. Begin with
``flops.py``.
"""
