"""Training on several GPUs: the ranks of a run and what they exchange (``world.py``, begin there), FSDP2 around a policy
(``fsdp.py``), and ranks that compute one batch together (``sequence.py``).
"""
