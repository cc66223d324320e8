"""What some families of models need beside attention: ``linear.py`` (layers with a state, over a forest: ``convolution.py`` and
``delta_rule.py``), ``experts.py`` (mixtures: how they are computed, named, pushed; ``expert_products.py``, and LoRA's
``expert_adapters.py``), ``vision.py`` (images: towers, their features, rows that see each other).
"""
