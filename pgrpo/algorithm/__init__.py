"""GRPO's mathematics, tensors in, tensors out: ``advantages.py``, ``loss.py``, and the numbers that are logged
(``metrics.py``).
"""
