"""Sampling with the policy's own transformers model, in the trainer's process. Begin with ``engine.py``."""
