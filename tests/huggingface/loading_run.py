"""A script that loads base checkpoints, run by ``test_base.py`` in a subprocess.

    export PYTHONPATH=tests XLA_FLAGS=--xla_force_host_platform_device_count=8
    python tests/huggingface/loading_run.py meshes FOLDER
    python tests/huggingface/loading_run.py memory FOLDER

``meshes``: loaded parameters have the given parameters' or metadata's shardings, and equal values.
``memory``: in addition to the result, memory holds not much more than one tensor at a time.
"""

import math
import pathlib
import resource
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from support import hf_numpy
from support.hf_flax import NNX_LLAMA, Llama, NnxLlama, Sizes

from adalora_jax import huggingface as peft
from adalora_jax._src._compat import sharding_key
from adalora_jax._src.tensorfile import Spec, stream_tensors

FOLDER = pathlib.Path(sys.argv[-1])
SIZES = Sizes(layers=4, groups=2)
IDS = np.zeros((1, 5), np.int32)


def spec(leaf):
    """Return a spec over both axes of the mesh, for some leaves along the stack, too."""
    if leaf.ndim < 2:
        return P("model") if leaf.shape[0] % 2 == 0 else P()
    ways = [P("model", "data"), P("data", None, "model"), P(None, ("data", "model"), None)]

    def fits(spec):
        return all(
            size % {"data": 4, "model": 2, ("data", "model"): 8}.get(name, 1) == 0
            for size, name in zip(leaf.shape, spec)
        )

    return next(filter(fits, ways[leaf.ndim % 2 :]), P())


def check(leaf, where, expected):
    assert leaf.sharding.is_equivalent_to(where, leaf.ndim), (leaf.sharding, where)
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected))


def meshes():
    tensors = hf_numpy.llama_tensors(SIZES)
    save_file(tensors, FOLDER / "model.safetensors")
    model = Llama(SIZES, stacked=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)
    plain = peft.load_base(FOLDER, model, shapes, names="llama")
    assert {leaf.sharding for leaf in jax.tree.leaves(plain)} == {jnp.ones(1).sharding}
    assert not any(leaf.committed for leaf in jax.tree.leaves(plain))
    assert sum(spec(leaf) != P() for leaf in jax.tree.leaves(plain)) > 8
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        where = jax.tree.map(lambda leaf, mesh=mesh: NamedSharding(mesh, spec(leaf)), shapes)
        zeros = lambda leaf, at: jax.device_put(np.zeros(leaf.shape, leaf.dtype), at)
        given = {
            "arrays": jax.tree.map(zeros, shapes, where),
            "shapes": jax.tree.map(
                lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, where
            ),
            "metadata": jax.tree.map(
                lambda s: nn.Partitioned(s, tuple(spec(s)) + (None,) * (s.ndim - len(spec(s)))),
                shapes,
            ),
        }
        for variables in given.values():
            with jax.set_mesh(mesh):
                got = peft.load_base(FOLDER, model, variables, names="llama")
            assert jax.tree.structure(got) == jax.tree.structure(variables)
            list(map(check, leaves(got), leaves(where), leaves(plain)))
        got = peft.load_base(FOLDER, model, given["arrays"], names="llama")
        list(map(check, leaves(got), leaves(where), leaves(plain)))
    one = jax.devices()[3]
    given = jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), one), shapes)
    got = peft.load_base(FOLDER, model, given, names="llama")
    assert {leaf.device for leaf in jax.tree.leaves(got)} == {one}
    in_nnx(mesh)


def in_nnx(mesh):
    """Check an NNX model with sharding metadata, under a mesh that is set."""
    names = [*NNX_LLAMA, *peft.hf_names("llama").pairs]
    make = lambda: NnxLlama(SIZES, stacked=True)
    plain = nnx.state(peft.load_base(FOLDER, nnx.eval_shape(make), names=names))
    model = nnx.eval_shape(make)
    named = nnx.Param(jnp.zeros(1), sharding=(None,), eager_sharding=False)
    key = sharding_key(named)  # as this version of Flax calls it
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        full = (*spec(variable), *[None] * (variable.ndim - len(spec(variable))))
        variable.set_metadata(**{key: full})
    wanted = [NamedSharding(mesh, spec(v)) for v in jax.tree.leaves(nnx.state(model, nnx.Param))]
    with jax.set_mesh(mesh):
        got = nnx.state(peft.load_base(FOLDER, model, names=names))
    list(map(check, leaves(got), wanted, leaves(plain)))


def leaves(tree):
    return jax.tree.leaves(tree)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


LAYERS, SIZE = 32, 1024
TENSOR = SIZE * SIZE * 4


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = lambda module, x, _: (module(x), None)
        over = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(layer, **over, length=LAYERS)(nn.Dense(SIZE, name="layers"), x, None)[0]


def memory():
    shapes = {"weight": (SIZE, SIZE), "bias": (SIZE,)}
    spec = lambda shape: Spec("F32", shape, 4 * math.prod(shape))
    specs = {f"{i}.{n}": spec(shape) for i in range(LAYERS) for n, shape in shapes.items()}
    number = lambda name: np.full(specs[name].shape, int(name.split(".")[0]), np.float32)
    with open(FOLDER / "model.safetensors", "wb") as file:
        stream_tensors(file, specs, lambda name: [number(name).tobytes()], {})
    variables = jax.eval_shape(Deep().init, jax.random.key(0), jnp.ones((1, SIZE)))
    jax.block_until_ready(jnp.zeros(3) + 1)
    before = peak()
    variables = peft.load_base(FOLDER, Deep(), variables, names={"layers[{i}]": "{i}"})
    rest = peak() - before - LAYERS * TENSOR
    kernel = variables["params"]["layers"]["kernel"]
    np.testing.assert_array_equal(kernel[:, 5, 7], np.arange(LAYERS))
    assert rest < LAYERS / 2 * TENSOR, f"{rest / TENSOR:.1f} tensors besides"
    print(f"{rest / TENSOR:.1f} tensors besides the result")


if __name__ == "__main__":
    {"meshes": meshes, "memory": memory}[sys.argv[1]]()
