"""Strict arithmetic for the tests."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _explicit_ranks():
    """No silent broadcast of arrays of different rank, in any test."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def strict_dtypes():
    """No silent promotion of dtypes: for tests without optax, whose own code promotes."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def quick_compile():
    """For tests that run many small programs once: compiling them is what takes the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
