"""How a run ends: signals, stopping at the next safe point, deadlines for calls that hang, the process's exit, and the lock
of a run folder.
"""
