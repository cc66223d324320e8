"""Flash attention behind one pair of signatures (``flash.py``), on GPUs and on CPUs, and Triton kernels for the merge."""
