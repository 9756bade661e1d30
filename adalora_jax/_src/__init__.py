"""The implementation. The public modules in ``adalora_jax`` list their names in ``__all__``."""
