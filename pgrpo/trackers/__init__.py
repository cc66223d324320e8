"""Where a run's numbers go: metrics.jsonl and completions.jsonl always; terminal, wandb and tensorboard when asked for."""

from pgrpo.trackers.console import printable
from pgrpo.trackers.run import Trackers

__all__ = ["Trackers", "printable"]
