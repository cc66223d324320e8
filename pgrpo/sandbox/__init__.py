"""Runs programs that a model wrote: no network, no files of this machine, bounded in every resource.

Begin with ``run.py`` (one program) and ``calls.py`` (tests that call a program's functions from another sandbox).
``launchers.py`` makes the namespaces, ``jail.py`` runs inside them, ``find.py`` tries what works on this machine.
"""
