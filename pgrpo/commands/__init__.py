"""The commands of ``pgrpo NAME`` other than ``train``, a file each. ``pgrpo.cli`` parses arguments and imports a command only when
it is called, so that ``pgrpo --help`` is fast. Begin with ``check.py``.
"""
