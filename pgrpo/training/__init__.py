"""Training. Begin with ``loop.py``, the training loop. ``sample.py`` samples and scores a step's groups, ``update.py`` does its
optimizer steps, ``run.py`` builds a run from its config, ``checkpointing.py`` saves and restores it.
"""

from pgrpo.training.loop import train

__all__ = ["train"]
