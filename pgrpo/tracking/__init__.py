"""Where a run's numbers go: metrics.jsonl and completions.jsonl always; terminal, wandb and tensorboard when asked for."""

from pgrpo.tracking.console import Terminal, printable
from pgrpo.tracking.run import Trackers
from pgrpo.tracking.services import check_services

__all__ = ["Terminal", "Trackers", "check_services", "printable"]
