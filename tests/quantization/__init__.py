"""Tests of ``adalora_jax/_src/quantization``, in files named after its modules."""
