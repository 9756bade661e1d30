"""Save, restore, resume: the whole training state in one orbax checkpoint."""

from adalora_jax._src.checkpoint import Checkpoint, restore, save, save_args

__all__ = [
    "Checkpoint",
    "restore",
    "save",
    "save_args",
]
