"""What some families of models need beside attention: ``linear.py`` (states and short convolutions over a forest), ``experts.py``
(mixtures: how they are computed, named and pushed).
"""
