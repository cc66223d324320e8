"""Puts a model on this rank's device: what a config leaves open there, and what fits.

Begin with ``choices.py`` (kernel, compilation, engine). ``sizes.py`` gives the memory plan its arguments, ``vllm_memory.py`` shares
a GPU between policy and vLLM, ``layers.py`` chooses what layers recompute and how much of a prefix may be kept, ``awake.py``
whether vLLM sleeps during updates.
"""
