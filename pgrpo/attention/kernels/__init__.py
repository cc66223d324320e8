"""Flash attention on GPUs and CPUs behind one pair of functions, and Triton kernels that merge two attention results.
Begin with ``flash.py``.
"""
