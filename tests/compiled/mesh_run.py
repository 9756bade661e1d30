"""Training on meshes of 1 to 8 CPU devices, run by test_meshes.py in a subprocess.

    export XLA_FLAGS=--xla_force_host_platform_device_count=8
    python tests/compiled/mesh_run.py LAYOUT:DATA:MODEL

Prints each run's results as JSON: the masks of every step, the last adapters, the leaves with an
unexpected sharding, and the collectives of the optimizer's update.
"""

import functools
import json
import re
import sys
import tempfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adalora_jax as adalora
from adalora_jax import checkpoint

CONFIG = adalora.AdaLoraConfig(
    total_step=6,
    init_r=4,
    target_r=2,
    tinit=1,
    tfinal=2,
    deltaT=1,
    lora_alpha=8,
    target_modules=r".*(up|down|heads|out)",
)
WIDTH, HEADS, LAYERS = 16, 8, 8


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.DenseGeneral((HEADS, 2), name="heads")(x)
        x = x + nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(jnp.tanh(h))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(nn.Dense(2 * WIDTH, name="up")(x))), None


class Model(nn.Module):
    """Scanned layers, and one unstacked layer."""

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS
        )
        return nn.Dense(8, name="up")(blocks(name="layers")(x, None)[0])


def base_spec(layout, path, ndim):
    """Return a weight's spec: heads and hidden units along model, the other side along data."""
    scanned = "layers" in path
    if layout == "stack":
        return P("data") if scanned else P()
    if path[-1] == "bias" or layout == "data":
        return P()
    model = "model" if layout in ("tensor", "both") else None
    data = "data" if layout in ("fsdp", "both") else None
    sides = (model, data) if path[-2] in ("down", "out") else (data, model)
    middle = [None] * (ndim - scanned - 2)
    inside = (sides[0], *middle, sides[1]) if path[-2] == "out" else (*sides, *middle)
    return P(*[None] * scanned, *inside)


@functools.cache
def problem():
    model = Model()
    x = np.random.default_rng(0).normal(size=(CONFIG.total_step, 16, WIDTH)).astype(np.float32)
    y = np.tanh(x @ np.random.default_rng(1).normal(size=(WIDTH, 8))).astype(np.float32)
    return model, jax.jit(model.init)(jax.random.key(1), x[0]), x, y


def run(layout, shape, look_inside):
    model, variables, x, y = problem()
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(path, leaf):
        return NamedSharding(mesh, base_spec(layout, [key.key for key in path], leaf.ndim))

    base = jax.tree_util.tree_map_with_path(place, variables)
    variables = jax.device_put(variables, base)
    batch = NamedSharding(mesh, P() if layout == "stack" else P("data"))

    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(3), variables, x[0])
    tx = adalora.adalora(optax.adamw(0.02), CONFIG)
    abstract = jax.eval_shape(tx.init, adapters)
    specs = adapted.specs(variables, x[0])
    shardings = adalora.sharding.shardings
    placed = shardings(adapters), shardings(abstract, specs, tx=tx, mesh=mesh)
    opt_state = jax.jit(tx.init, out_shardings=placed[1])(adapters)

    def step(variables, adapters, opt_state, x, y):
        def loss(adapters):
            error = adapted.apply(variables, adapters, x) - y
            return jnp.mean(error**2) + adalora.orthogonality(adapters, CONFIG)

        grads = jax.grad(loss)(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state

    step = jax.jit(step, in_shardings=(base, *placed, batch, batch), out_shardings=placed)
    masks = []
    for t in range(CONFIG.total_step):
        data = jax.device_put((x[t], y[t]), batch)
        adapters, opt_state = step(variables, adapters, opt_state, *data)
        now = adalora.allocator_state(opt_state).masks
        masks.append({path: np.asarray(mask).tolist() for path, mask in now.items()})
        check_copies(now)
    return {
        "masks": masks,
        "adapters": {
            path: [np.asarray(leaf, np.float64).tolist() for leaf in adapter]
            for path, adapter in adapters.items()
        },
        "split": sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(adapters)),
        "astray": astray(mesh, specs, adapters, opt_state),
        "traces": step._cache_size(),
        "elsewhere": (
            restored_elsewhere(shape, specs, tx, adapters, opt_state) if look_inside else []
        ),
        "collectives": collectives(tx, adapters, opt_state, placed) if look_inside else [],
    }


def check_copies(masks):
    """Check that replicas of the same piece of a mask have equal bits."""
    for path, mask in masks.items():
        pieces = {}
        for shard in mask.addressable_shards:
            piece = np.asarray(shard.data)
            assert np.array_equal(piece, pieces.setdefault(str(shard.index), piece)), path


def astray(mesh, specs, adapters, opt_state):
    """List adapters, masks, moments and averages not sharded as the adapter's spec says."""
    adam, allocator = opt_state.inner[0], opt_state.allocator
    result = []
    for path, spec in specs.items():
        pairs = [(allocator.masks[path], spec.lam)]
        for node in (adapters, adam.mu, adam.nu, allocator.sensitivity, allocator.uncertainty):
            pairs += zip(node[path], spec)
        result += [
            f"{path}: {leaf.sharding} instead of {wanted}"
            for leaf, wanted in pairs
            if not leaf.sharding.is_equivalent_to(NamedSharding(mesh, wanted), leaf.ndim)
        ]
    return result


def restored_elsewhere(shape, specs, tx, *state):
    """List leaves with other bytes or shardings after a restore on the transposed mesh."""
    mesh = jax.make_mesh(shape[::-1], ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = functools.partial(adalora.sharding.shardings, mesh=mesh)
    placed = shardings(state[0], specs), shardings(state[1], specs, tx=tx)
    abstract = lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(f"{folder}/last", *state, CONFIG)
        target = jax.tree.map(abstract, state, placed)
        saved = checkpoint.restore(f"{folder}/last", target=target, config=CONFIG)
    named = jax.tree_util.tree_leaves_with_path((saved.adapters, saved.opt_state))
    return [
        jax.tree_util.keystr(path)
        for (path, leaf), before, at in zip(named, *map(jax.tree.leaves, (state, placed)))
        if leaf.sharding != at or np.asarray(leaf).tobytes() != np.asarray(before).tobytes()
    ]


def collectives(tx, adapters, opt_state, placed):
    """Return ``[operation, elements]`` of each collective in the optimizer's compiled update."""
    update = jax.jit(
        tx.update, in_shardings=(placed[0], placed[1], placed[0]), out_shardings=placed
    )
    text = update.lower(adapters, opt_state, adapters).compile().as_text()
    found = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    count = lambda shape: int(np.prod([int(n) for n in shape.split(",") if n], dtype=int))
    return [[op, sum(map(count, re.findall(r"\w+\[([\d,]*)\]", shapes)))] for shapes, op in found]


if __name__ == "__main__":
    look_inside = "--collectives" in sys.argv
    runs = [name for name in sys.argv[1:] if ":" in name]
    with jax.numpy_rank_promotion("raise"):
        results = {}
        for name in runs:
            layout, *shape = name.split(":")
            results[name] = run(layout, tuple(map(int, shape)), look_inside)
        print(json.dumps(results))
