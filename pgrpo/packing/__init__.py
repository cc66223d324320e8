"""Finds what samples share (``forest.py``, begin there), packs it into tensors once (``batch.py``), and divides a step's samples
into micro-batches of the token budget for each rank (``balance.py``).
"""
