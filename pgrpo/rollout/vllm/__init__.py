"""Sampling with vLLM in the trainer's processes. Begin with ``engine.py``; ``start.py`` starts it, ``delivery.py`` and
``canary.py`` make sure of its weights.
"""
