"""The families of public models that ``python -m benchmarks.models`` checks, and their packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

import adalora_jax as adalora


def direct(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the outputs of an NNX model that is called with its inputs."""
    return model(*args, **kwargs)


class Case(NamedTuple):
    """A model with its inputs.

    Attributes:
      model: a linen module, or an NNX model.
      variables: the linen model's variables; None for NNX.
      args, kwargs: arguments of ``module.apply`` or of ``call``.
      call: runs an NNX model.
      layers: ``{class: Layout}`` of declared layers.
      mesh: the mesh of a model that names the axes of one; None otherwise.
    """

    model: Any
    variables: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    call: Callable[..., Any] = direct
    layers: dict[type, adalora.Layout] | None = None
    mesh: jax.sharding.Mesh | None = None


Builds = dict[str, Callable[[], Case]]

TITLES = {
    "huggingface": "Hugging Face's Flax models",
    "tunix": "Tunix",
    "gemma": "Google DeepMind's gemma",
    "bonsai": "bonsai",
    "flax": "Flax's examples",
}
INSTALL = {
    "huggingface": "pip install 'transformers<5'",
    "tunix": "pip install '.[tunix]'",
    "gemma": "pip install '.[gemma]'",
    "bonsai": "--path FOLDER, a checkout of jax-ml/bonsai",
    "flax": "--path FOLDER, a checkout of google/flax",
}


def package(family: str) -> str | None:
    """Return the package of a family and its version; None if it is not installed."""
    modules = {"huggingface": "transformers", "flax": "examples"}
    if importlib.util.find_spec(modules.get(family, family)) is None:
        return None
    versions = f"JAX {jax.__version__} and Flax {flax.__version__}"
    names = {"huggingface": "transformers", "tunix": "google-tunix", "gemma": "gemma"}
    if family not in names:
        source = "jax-ml/bonsai" if family == "bonsai" else "google/flax"
        return f"a checkout of {source}, {versions}"
    version = importlib.metadata.version(names[family])
    if family == "huggingface" and int(version.partition(".")[0]) >= 5:
        return None  # has no Flax models
    return f"{names[family]} {version}, {versions}"


IDS = np.arange(12).reshape(2, 6) * 5 % 29 + 2
VOCABULARY = 31


def noisy(leaf: jax.Array) -> jax.Array:
    """Return a parameter with noise, since weights that start at zero pass on no gradient."""
    leaf = jnp.asarray(leaf)
    if not leaf.ndim or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    noise = np.random.default_rng(leaf.size).normal(size=leaf.shape)
    return (leaf + 0.1 * noise).astype(leaf.dtype)


def floats(*shape: int) -> np.ndarray:
    """Return random inputs."""
    return np.random.default_rng(0).normal(size=shape).astype("f4")
