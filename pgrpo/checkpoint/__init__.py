"""Checkpoints: named sets of tensors and JSON scalars, written whole or not at all. Knows nothing of models.

    step_40/
      model.0.safetensors       one file a tensor set and rank: each rank writes what it holds
      model.1.safetensors
      optimizer.0.safetensors
      optimizer.1.safetensors
      scalars.json
      manifest.json             step, and size and sha256 of every other file

A checkpoint is written under a hidden name, synced to the disk and renamed, so a ``step_N`` that exists was once
complete; the manifest tells whether it still is. Nothing here pickles: tensors are safetensors, the rest is JSON.

``files`` writes and reads one folder, ``folder`` keeps the folders of a run, ``writer`` writes while training goes on, ``lock``
keeps a second run out, which is what makes cleaning up after a killed write safe.

Why not ``torch.distributed.checkpoint``: its safetensors writer plans over the process group in the thread that writes, takes a
tensor's shape from the shards that it finds (one that is lost makes the tensor smaller), and leaves sums and renaming to us.
"""

from pgrpo.checkpoint.files import CheckpointError, Saved, load, open_saved, verify
from pgrpo.checkpoint.folder import PREFIX, latest, list_steps, prune, save, set_aside_after, tidy
from pgrpo.checkpoint.writer import Writer

__all__ = [
    "PREFIX",
    "CheckpointError",
    "Saved",
    "Writer",
    "latest",
    "list_steps",
    "load",
    "open_saved",
    "prune",
    "save",
    "set_aside_after",
    "tidy",
    "verify",
]
