"""Where a run's numbers go: metrics.jsonl and completions.jsonl always; terminal, wandb and tensorboard when asked for."""

from pgrpo.trackers.console import Terminal, printable
from pgrpo.trackers.run import Trackers
from pgrpo.trackers.services import check_services

__all__ = ["Terminal", "Trackers", "check_services", "printable"]
