"""Tests of ``adalora_jax/_src/modules``, in files named after its modules."""
