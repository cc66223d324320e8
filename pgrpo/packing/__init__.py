"""Packs samples into tensors that hold each prompt once (``batch.py``, begin there), and divides a step's groups into
micro-batches of the token budget for each rank (``balance.py``).
"""
