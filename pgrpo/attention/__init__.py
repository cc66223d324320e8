"""Attention over packed groups, in which each prompt is stored and computed once.

``reference.py`` is the spec, ``grouped.py`` the fast path, ``kernels.py`` the flash kernels it runs on, ``layout.py`` the
geometry they share, ``interface.py`` the door through which transformers models reach them.
"""
