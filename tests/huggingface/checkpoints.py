"""Base checkpoints for the tests, and abstract variables to load them into."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from support.hf_flax import Sizes

SIZES = Sizes(layers=3)
IDS = np.arange(14).reshape(2, 7) * 5 % SIZES.vocabulary


class Einsum(nn.Module):
    """A layer as in google-deepmind/gemma, whose equation is an argument of the call."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.param("w", nn.initializers.zeros, self.shape))


def write(folder, tensors, shards=1, config=None):
    """Write a checkpoint of this many files."""
    folder.mkdir(exist_ok=True, parents=True)
    names = list(tensors)
    files = {f"model-{n:05}-of-{shards:05}.safetensors": names[n::shards] for n in range(shards)}
    if shards == 1:
        files = {"model.safetensors": names}
    for file, mine in files.items():
        save_file({n: np.ascontiguousarray(tensors[n]) for n in mine}, folder / file)
    if shards > 1:
        places = {name: file for file, mine in files.items() for name in mine}
        index = {"metadata": {"total_size": 1}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def abstract(model, ids=IDS):
    return jax.eval_shape(model.init, jax.random.key(0), ids)


def close(actual, expected, tolerance=2e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())
