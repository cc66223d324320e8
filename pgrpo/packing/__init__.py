"""Samples into packed tensors that hold each prompt once (``batch.py``), filled to the token budget and shared out among
ranks (``balance.py``).
"""
