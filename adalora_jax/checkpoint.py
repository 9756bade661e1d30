"""Checkpoints of the whole training state with orbax: saving, restoring and resuming.

A checkpoint has the adapters, the state of optimizer and allocator, the step, the config and the
library's version. The base model is not saved. :func:`save` and :func:`restore` write and read one
folder; :func:`save_args` has the same content for an ``orbax.checkpoint.CheckpointManager``.
"""

from adalora_jax._src.checkpoint import Checkpoint, restore, save, save_args

__all__ = [
    "Checkpoint",
    "restore",
    "save",
    "save_args",
]
