"""How a process starts and ends: stop signals, deadlines for calls that hang, the exit code, random generators, and the lock of
a run folder. Begin with ``signals.py``.
"""
