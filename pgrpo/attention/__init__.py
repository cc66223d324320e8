"""Attention over a packed forest, in which every distinct prefix is stored and computed once.

Begin with ``layout.py`` (which rows attend to which) and ``reference.py`` (the specification, dense and slow). ``grouped.py`` is
the fast path, ``choose.py`` picks one of two ways for each depth, ``kernels/`` has the flash kernels, and transformers calls
``hook.py``.
"""
