"""Settings of the back end, and fixtures about promotion and the shapes of adapters."""

import inspect
import os
import typing

import jax
import pytest
from jaxtyping import jaxtyped
from support import compiling

os.environ.setdefault("XLA_FLAGS", compiling.FLAGS)  # XLA reads it when it first compiles
# On a GPU, processes share the memory; otherwise the first takes three quarters of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_sessionstart():
    """Multiply in float32 where the default is TF32 or bfloat16, in subprocesses, too."""
    if jax.default_backend() != "cpu":
        os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
        jax.config.update("jax_default_matmul_precision", "highest")


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


@pytest.fixture(autouse=True, scope="session")
def _typed_adapters(pytestconfig):
    """With ``--jaxtyping-packages``, check every new Adapter of arrays against its annotations.

    jaxtyping itself would also reject masks and the other values that JAX puts in an Adapter.
    """
    if not pytestconfig.getoption("jaxtyping_packages"):
        yield
        return
    from adalora_jax import Adapter

    hints, wrapped = typing.get_type_hints(Adapter), Adapter.__init__
    init = inspect.unwrap(wrapped)

    def checked(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if all(isinstance(leaf, jax.Array) and leaf.dtype != bool for leaf in self):
            with jaxtyped("context"):
                for name, leaf in self._asdict().items():
                    assert isinstance(leaf, hints[name]), f"{name} is {leaf.aval}: {hints[name]}"

    Adapter.__init__ = checked
    yield
    Adapter.__init__ = wrapped
