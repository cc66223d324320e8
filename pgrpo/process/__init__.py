"""Start and end of a process: stop signals, deadlines for calls that hang, the exit code, random generators, and the lock of a run
folder. Begin with ``signals.py``.
"""
