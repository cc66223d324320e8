"""Predicts the cost of a step before it runs: FLOPs (``flops.py``) and GPU memory (``memory.py``), by which ``recompute.py``
chooses what backwards recompute. ``hub.py`` reads a model's config, ``dims.py`` its sizes. ``pgrpo/placement`` uses all of it to
place a model on its device. Begin with ``flops.py``.
"""
