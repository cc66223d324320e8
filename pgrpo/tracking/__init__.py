"""Writes a run's metrics and completions: always to metrics.jsonl and completions.jsonl, and to the terminal, wandb and tensorboard
as configured. Begin with ``run.py``. ``intervals.py`` has the confidence intervals of what is written.
"""

from pgrpo.tracking.console import Terminal, printable, terminal
from pgrpo.tracking.run import EarlyWarnings, Trackers
from pgrpo.tracking.services import check_services

__all__ = ["EarlyWarnings", "Terminal", "Trackers", "check_services", "printable", "terminal"]
