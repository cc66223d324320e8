"""Decides whether a model may be trained: by a proof on a small copy of it, not by a list. Begin with ``models.py``; ``proof.py``
compares, ``shrink.py`` makes the small config, ``fits.py`` refuses by numbers, ``on_device.py`` compares the GPU's kernels.
"""
