"""What a step costs, before it runs: FLOPs (``flops.py``), GPU memory (``memory.py``), and how a model is placed on its
device because of them (``placement.py``).
"""
