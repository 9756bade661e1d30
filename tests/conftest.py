"""Fixtures that forbid or allow implicit rank and dtype promotion."""

import os

import jax
import pytest
from support import compiling

os.environ.setdefault("XLA_FLAGS", compiling.FLAGS)  # XLA reads it when it first compiles


@pytest.fixture(autouse=True)
def _explicit_ranks():
    """Raise on implicit rank promotion in every test."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def strict_dtypes():
    """Raise on implicit dtype promotion; for tests without optax, whose own code promotes."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def flax_ranks():
    """Allow rank promotion, which Flax's norms, attention and recurrent layers need."""
    with jax.numpy_rank_promotion("allow"):
        yield
