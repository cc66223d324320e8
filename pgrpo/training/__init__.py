"""What a training is beside its algorithm (``pgrpo/grpo.py``): from a config to the parts of a run (``build.py``), the run in its
folder (``session.py``), what is saved (``checkpointing.py``, ``progress.py``), evaluation, the optimizer.
"""
