"""Runs programs that a model wrote: no network, no files of this machine, bounded in every resource. Begin with ``run.py``;
``jail.py`` is what runs inside.
"""
