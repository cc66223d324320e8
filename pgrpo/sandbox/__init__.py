"""Runs programs that a model wrote, without network or files of this machine, and with limits on every resource.

Begin with ``run.py`` (one program) and ``calls.py`` (tests that call a program's functions from another sandbox).
``launchers.py`` creates the namespaces, ``jail.py`` runs inside them, ``find.py`` finds a launcher that works on this machine.
"""
