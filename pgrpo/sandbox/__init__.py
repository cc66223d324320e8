"""Runs programs that a model wrote, without network, without files of this machine, and with a limit on every resource.
Begin with ``run.py``, which starts a program from outside; ``jail.py`` runs inside and confines itself first.
"""
