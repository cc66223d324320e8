"""Engines that sample completions, behind one protocol (``base.py``)."""
