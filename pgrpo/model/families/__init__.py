"""What some families of models need beside attention: ``linear.py`` (states and short convolutions over a forest), ``experts.py``
(mixtures: how they are computed, named and pushed), ``vision.py`` (images: towers, their features, rows that see each other).
"""
