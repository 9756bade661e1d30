"""Strict arithmetic for the tests."""

import os

import compiling
import jax
import pytest

os.environ.setdefault("XLA_FLAGS", compiling.FLAGS)  # XLA reads it when it first compiles


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
