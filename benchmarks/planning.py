"""Memory and communication of large models on large meshes, from compiled steps without arrays.

    python -m benchmarks.planning [NAME ...]

The shapes are those of models with 7 and 70 billion parameters, and of two with experts, the second
of which has a million triplets. Layers are scanned and rematerialised. The frozen base is bfloat16
and sharded over both axes of a mesh of 256 or 512 devices (FSDP along data, tensor or expert
parallel along model). Every kernel has a float32 adapter, and the inner optimizer is AdamW.
Everything is lowered from shapes and compiled by XLA for as many virtual CPU devices; nothing is
allocated.

The size of a collective is the bytes of its result on one device, times the trip count of its loop.
Other backends choose other collectives and overlap them with computation, so the benchmark reports
sizes, not time. All collectives of the optimizer's update are the allocator's, since AdamW has
none. Takes about a minute per model; the results of models that are not named remain.
"""

import argparse
import json
import os
import re
import time
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adalora_jax as adalora
from benchmarks import results

# Virtual devices, and no optimisation of the machine code, which is never run.
FLAGS = (
    "--xla_force_host_platform_device_count=512 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
TOKENS = 2048  # per sequence; one sequence per device along data


class Shape(NamedTuple):
    layers: int
    width: int
    hidden: int
    kv: int  # width of keys and values
    experts: int  # 0: a dense MLP
    rank: int
    mesh: tuple[int, int]


MODELS = {
    "7B": Shape(32, 4096, 11008, 4096, 0, 16, (64, 4)),
    "70B": Shape(80, 8192, 28672, 1024, 0, 16, (64, 8)),
    "8 experts": Shape(32, 4096, 14336, 1024, 8, 16, (64, 8)),
    "128 experts": Shape(60, 4096, 1536, 512, 128, 44, (64, 8)),
}


class Block(nn.Module):
    shape: Shape

    @nn.compact
    def __call__(self, x, _):
        s, heads = self.shape, self.shape.width // 128

        def dense(n, name):
            return nn.Dense(n, use_bias=False, name=name, dtype=x.dtype)

        def split(y):
            return y.reshape(*y.shape[:-1], -1, 128)

        q, k, v = split(dense(s.width, "q")(x)), *(split(dense(s.kv, n)(x)) for n in "kv")
        k, v = (jnp.repeat(a, heads // a.shape[-2], axis=-2) for a in (k, v))
        mixed = nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = x + dense(s.width, "o")(mixed)
        if not s.experts:
            h = nn.silu(dense(s.hidden, "gate")(x)) * dense(s.hidden, "up")(x)
            return x + dense(s.width, "down")(h), None
        # Every expert gets the same number of tokens.
        tokens = x.reshape(-1, s.experts, s.width).swapaxes(0, 1)

        def each(i, o, name):
            return nn.Einsum(
                (s.experts, i, o), "etd,edf->etf", use_bias=False, name=name, dtype=x.dtype
            )

        h = nn.silu(each(s.width, s.hidden, "gate")(tokens)) * each(s.width, s.hidden, "up")(tokens)
        h = each(s.hidden, s.width, "down")(h)
        return x + h.swapaxes(0, 1).reshape(x.shape), None


class Model(nn.Module):
    shape: Shape

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.shape.layers,
        )
        return layers(self.shape, name="layers")(x, None)[0]


def base_spec(path, ndim):
    """Return the spec of a kernel: outputs along model, inputs along data; swapped for o and down.

    Experts are sharded along model, and their input features along data.
    """
    if ndim == 4:
        return P(None, "model", "data", None)
    return P(None, "model", "data") if path[-2] in ("o", "down") else P(None, "data", "model")


def plan(shape):
    """Return the numbers of one model, a row of the tables."""
    mesh = jax.make_mesh(shape.mesh, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    config = adalora.AdaLoraConfig(
        total_step=1000, init_r=shape.rank, target_r=shape.rank // 2, target_modules="all-linear"
    )
    model = Model(shape)

    def at(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    batch = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((shape.mesh[0], TOKENS, shape.width), jnp.bfloat16, sharding=batch)
    base = jax.eval_shape(model.init, jax.random.key(0), x)
    base = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.bfloat16,
            sharding=NamedSharding(mesh, base_spec([k.key for k in path], leaf.ndim)),
        ),
        base,
    )
    adapted = adalora.linen.adapt(model, config)
    tx = adalora.adalora(optax.adamw(1e-3), config)
    adapters = jax.eval_shape(adapted.init, jax.random.key(0), base, x)
    opt_state = jax.eval_shape(tx.init, adapters)
    specs, shardings = adapted.specs(base, x), adalora.sharding.shardings
    placed = (
        shardings(adapters, specs, mesh=mesh),
        shardings(opt_state, specs, tx=tx, mesh=mesh),
    )
    adapters, opt_state = jax.tree.map(at, (adapters, opt_state), placed)

    def step(base, adapters, opt_state, x):
        def loss(adapters):
            y = adapted.apply(base, adapters, x).astype(jnp.float32)
            return jnp.mean(y**2) + adalora.orthogonality(adapters, config)

        grads = jax.grad(loss)(adapters)
        updates, opt_state = tx.update(grads, opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state

    start = time.perf_counter()
    whole = jax.jit(step, out_shardings=placed).lower(base, adapters, opt_state, x).compile()
    seconds = time.perf_counter() - start
    update = jax.jit(tx.update, out_shardings=placed).lower(adapters, opt_state, adapters).compile()
    moved, counted = collectives(whole.as_text()), collectives(update.as_text())
    allocator = opt_state.allocator
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(base)),
        "matrices": sum(int(np.prod(a.lam.shape[:-1])) for a in adapters.values()),
        "triplets": sum(a.lam.size for a in adapters.values()),
        "devices": int(np.prod(shape.mesh)),
        "base": on_a_device(base),
        "adapters": on_a_device(adapters),
        "averages": on_a_device((allocator.sensitivity, allocator.uncertainty)),
        "masks": on_a_device(allocator.masks),
        "moments": on_a_device(opt_state.inner),
        "collectives of a step": sum(moved),
        "of the allocator": sum(counted),
        "allocator's number": len(counted),
        "allocator's share": sum(counted) / sum(moved),
        "seconds to compile": round(seconds, 1),
    }


def on_a_device(tree):
    """Return the bytes of one device's shards."""

    def part(leaf):
        return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))

    return sum(part(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}


def collectives(text):
    """Return the bytes of the result of every collective of a program, repeated as it is run."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    (entry,) = re.findall(r"^ENTRY %([\w.-]+) ", text, re.M)
    operation = r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\("

    def size(shapes):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        return sum(
            BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64))
            for kind, dims in arrays
        )

    def of(name):
        result = []
        for line in bodies[name].splitlines():
            if found := re.search(operation, line):
                result.append(size(found[1]))
            if found := re.search(r" while\(.*body=%([\w.-]+)", line):
                trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                if inside := of(found[1]):
                    result += inside * int(trips[1])
            elif found := re.search(r" conditional\(", line):
                branches = re.findall(r"(?:true|false)_computation=%([\w.-]+)", line)
                listed = re.search(r"branch_computations=\{(.*?)\}", line)
                branches += re.findall(r"%([\w.-]+)", listed[1]) if listed else []
                result += max(map(of, branches), key=sum)
            elif found := re.search(r" call\(.*to_apply=%([\w.-]+)", line):
                result += of(found[1])
        return result

    return of(entry)


def text(found: results.Results) -> str:
    models = {name: found[name] for name in MODELS if name in found}

    def table(columns):
        """Return a table of ``{header: (field, unit)}``, one row per model."""
        rows = [("model", *columns)]
        for name, row in models.items():

            def shown(value, unit):
                return results.number(value / unit) if unit != 1 else f"{value:,}"

            rows.append((name, *(shown(row[field], unit) for field, unit in columns.values())))
        return results.markdown(rows)

    most = max(row["allocator's share"] for row in models.values())
    sizes = {
        "parameters, billions": ("parameters", 1e9),
        "adapted matrices": ("matrices", 1),
        "triplets": ("triplets", 1),
        "devices": ("devices", 1),
        "time to compile, seconds": ("seconds to compile", 1),
    }
    memory = {
        "frozen base, MB": ("base", 1e6),
        "adapters, MB": ("adapters", 1e6),
        "AdamW's moments, MB": ("moments", 1e6),
        "allocator's averages, MB": ("averages", 1e6),
        "allocator's masks, kB": ("masks", 1e3),
    }
    traffic = {
        "all collectives, GB": ("collectives of a step", 1e9),
        "the allocator's collectives, kB": ("of the allocator", 1e3),
        "the allocator's share, parts per million": ("allocator's share", 1e-6),
        "number of the allocator's collectives": ("allocator's number", 1),
    }
    return "\n\n".join(
        [
            "# Memory and communication on large meshes",
            "The benchmark compiles the training step of large models for a mesh of 256 or 512 "
            "devices, from shapes alone: nothing is allocated or run. The frozen base is bfloat16 "
            "and sharded over both axes of the mesh. Every weight has a float32 adapter of rank "
            + ", ".join(f"{MODELS[name].rank} ({name})" for name in models)
            + ". The optimizer is AdamW.",
            table(sizes),
            "## Memory per device\n\nThis is the memory of each device between steps. The factor p "
            "of an adapter is sharded like the outputs of its weight and q like the inputs, and "
            "each is replicated along the other axis of the mesh. Averages and moments are sharded "
            f"like the adapters.\n\n{table(memory)}",
            "## Communication per device and step\n\nThe size of a collective is the size of its "
            "result on one device, for every time it runs. Other backends may choose other "
            "collectives, so these are sizes and not times.\n\n" + table(traffic),
            "The allocator ranks all triplets of all devices, but communicates only about one "
            "number per triplet and axis of the mesh, or less: at most "
            f"{results.number(1e6 * most)} parts per million of the step's communication.",
            results.ending("planning", found),
        ]
    )


def main() -> None:
    os.environ |= {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}  # before JAX's first use
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="*", help=f"model to plan: {', '.join(MODELS)}")
    names = parser.parse_args().name
    if unknown := set(names) - set(MODELS):
        parser.error(f"no model is called {', '.join(sorted(unknown))}")
    file = results.HERE / "planning.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    plans = {name: row for name, row in before.items() if name in MODELS}
    plans |= {name: plan(MODELS[name]) for name in names or MODELS}
    results.finish("planning", plans, text)


if __name__ == "__main__":
    main()
