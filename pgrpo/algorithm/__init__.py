"""The mathematics of GRPO, tensors in and tensors out, without models or config files: ``advantages.py``, ``loss.py`` (begin
there) and metrics of a step (``metrics.py``).
"""
