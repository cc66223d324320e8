"""Engines that sample completions: ``embedded/`` with the policy's own model, ``vllm/`` with vLLM in the trainer's processes.
Begin with ``base.py``, the protocol that both implement.
"""
