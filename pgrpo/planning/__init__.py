"""Predicts the cost of a step before it runs: FLOPs (``flops.py``) and GPU memory (``memory.py``). ``placement.py`` uses both
to choose kernel, compilation and activation checkpointing, and puts the model on its device. Begin with ``flops.py``.
"""
