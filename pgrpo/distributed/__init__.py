"""Several processes: the ranks of a run (``world.py``), FSDP2 around a policy (``fsdp.py``), and which part of a tensor a
rank holds (``shards.py``).
"""
