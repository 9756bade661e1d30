"""Tests of ``adalora_jax/_src/core``, in files named after its modules."""
