"""Tests of ``adalora_jax/_src/huggingface``, in files named after its modules."""
