"""Samples with vLLM in the trainer's processes. Begin with ``engine.py``. ``start.py`` starts vLLM, ``requests.py`` translates
prompts and completions, ``delivery.py`` and ``canary.py`` verify that vLLM has the policy's current weights.
"""
