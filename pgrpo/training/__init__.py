"""Training: ``loop.py`` is the loop, ``run.py`` what a run is made of and how it is saved, ``update.py`` one step's updates."""

from pgrpo.training.loop import train

__all__ = ["train"]
