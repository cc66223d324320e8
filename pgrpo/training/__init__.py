"""Training around the algorithm (``pgrpo/grpo.py``). Begin with ``session.py``, a run in its folder. ``build.py`` makes its
parts from a config (``prompts.py``: those of the data), ``update.py`` has the pieces of an update, ``checkpointing.py`` and
``progress.py`` save and restore.
"""
