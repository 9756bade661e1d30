"""Initial values that need the model: from its weights, or from what goes into its layers."""

from adalora_jax._src.modules.data_init import eva_init, eva_ranks, input_second_moments, pissa_init

__all__ = [
    "eva_init",
    "eva_ranks",
    "input_second_moments",
    "pissa_init",
]
