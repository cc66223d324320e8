"""Decides whether a model may be trained: by a proof on a small copy of it, not by a list. Begin with ``models.py``; ``proof.py``
compares (``compare.py``) and seeds bugs (``seeded_bugs.py``), ``shrink.py`` makes the small config, of layers of
every kind (``kinds.py``), ``fits.py`` refuses by numbers, ``on_device.py`` compares the GPU's kernels.
"""
