"""Checkpoints: named sets of tensors and JSON scalars, written atomically. Independent of models.

    step_40/
      model.0.safetensors       one file a tensor set and rank: each rank writes what it holds
      model.1.safetensors
      optimizer.0.safetensors
      optimizer.1.safetensors
      scalars.json
      manifest.json             step, and size and sha256 of every other file

A checkpoint is written under a hidden name, synced to the disk and renamed, so a ``step_N`` that exists was complete; the
manifest shows whether it still is. Nothing is pickled: tensors are safetensors, the rest is JSON.

Begin with ``files.py``, which writes and reads one folder; ``shards.py`` says what part of a tensor a rank holds and writes.
``folder.py`` manages the folders of a run, ``writer.py`` writes in the background while training continues. The lock of the run
folder (``process/lock.py``) keeps a second run out, so that cleaning up after a killed write is safe.

Why not ``torch.distributed.checkpoint``: its safetensors writer communicates over the process group from the writing thread, and
takes a tensor's shape from the shards it finds, so a lost shard makes the tensor smaller. It has no checksums and no renaming.
"""

from pgrpo.checkpoint.files import Saved, load, open_saved, verify
from pgrpo.checkpoint.folder import PREFIX, latest, list_steps, prune, remove, save, set_aside_after, tidy
from pgrpo.checkpoint.forms import COUNT, CheckpointError, check
from pgrpo.checkpoint.writer import Writer

__all__ = [
    "COUNT",
    "PREFIX",
    "CheckpointError",
    "Saved",
    "Writer",
    "check",
    "latest",
    "list_steps",
    "load",
    "open_saved",
    "prune",
    "remove",
    "save",
    "set_aside_after",
    "tidy",
    "verify",
]
