"""A tiny training problem for the tests: a few adapted linear layers that fit random targets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adalora_jax as al

# {name: (in, out, stack)}: different shapes, one of them two stacked layers, in JAX's order.
SHAPES = {"down": (5, 3, ()), "key": (4, 4, ()), "layers": (3, 5, (2,))}
MATRICES = 4


def adapters(config, seed=0, shapes=SHAPES, ranks=None):
    """Return fresh adapters, ``{name: Adapter}``; ``ranks`` overrides ``init_r`` by name."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: al.init_adapter(
            key, n_in, n_out, config, stack=stack, rank=(ranks or {}).get(name, config.init_r)
        )
        for key, (name, (n_in, n_out, stack)) in zip(keys, shapes.items())
    }


def batches(config, seed=0, shapes=SHAPES, tokens=4):
    """Return ``{name: (x, kernel, target)}`` with one batch per step on each array's first axis."""
    rng = np.random.default_rng(seed)
    steps, result = config.total_step, {}
    for name, (n_in, n_out, stack) in shapes.items():
        x = rng.normal(size=(steps, *stack, tokens, n_in))
        kernel = np.broadcast_to(
            rng.normal(size=(*stack, n_in, n_out)), (steps, *stack, n_in, n_out)
        )
        hidden = rng.normal(size=(*stack, n_in, 1)) * rng.normal(size=(*stack, 1, n_out))
        noise = rng.normal(size=(steps, *stack, tokens, n_out))
        result[name] = (x, kernel, x @ (kernel + hidden) + 0.1 * noise)
    return jax.tree.map(lambda a: jnp.asarray(a, config.param_dtype), result)


def loss(trees, batch, config):
    """Return the sum of the matrices' mean squared errors and the orthogonality penalty."""
    total = al.orthogonality(trees, config)
    for name, (x, kernel, target) in batch.items():
        y = al.forward(trees[name], x, kernel)
        total = total + jnp.sum(jnp.mean((y - target) ** 2, axis=(-2, -1)))
    return total


def train_step(tx, config):
    """Return a step ``params, state, batch → params, state, loss``, to be jitted."""

    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch, config)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def lenient(inner):
    """Run ``inner`` under JAX's default promotion rules, which several optax optimizers need.

    Transformations that wrap it stay under the strict rules of these tests.
    """
    inner = optax.with_extra_args_support(inner)

    def update(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return inner.update(*args, **kwargs)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def matrices(trees):
    """Convert ``{name: Adapter}`` to the oracle's NumPy matrices, one per slice of a stack."""
    result = []
    for name in sorted(trees):
        p, lam, q = (np.asarray(leaf, np.float64) for leaf in trees[name])
        indices = np.ndindex(lam.shape[:-1])
        result.extend({"p": p[index], "lam": lam[index], "q": q[index]} for index in indices)
    return result


def rows(trees):
    """Split per-adapter arrays, such as masks, into one per matrix, in the oracle's order."""
    arrays = [np.asarray(trees[name]) for name in sorted(trees)]
    return [array[index] for array in arrays for index in np.ndindex(array.shape[:-1])]


def oracle_batches(data):
    """Convert ``batches(...)`` to the oracle's form, ``[step][matrix] = (x, kernel, target)``."""
    steps = len(next(iter(data.values()))[0])
    result = []
    for t in range(steps):
        batch = []
        for name in sorted(data):
            arrays = [np.asarray(array[t], np.float64) for array in data[name]]
            indices = np.ndindex(arrays[0].shape[:-2])
            batch.extend(tuple(array[index] for array in arrays) for index in indices)
        result.append(batch)
    return result


def assert_same_bits(ours, theirs):
    """Check that two trees have equal structure, dtypes and bytes: NaN is NaN, 0.0 is not −0.0."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    named = jax.tree_util.tree_leaves_with_path(jax.device_get(ours))
    for (path, a), b in zip(named, jax.tree.leaves(jax.device_get(theirs))):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), jax.tree_util.keystr(path)
        assert a.tobytes() == b.tobytes(), f"{jax.tree_util.keystr(path)}: {a} is not {b}"


def active(masks):
    """Return the total number of active triplets in all adapters."""
    return sum(int(np.sum(mask)) for mask in jax.tree.leaves(masks))


def gradients(params, seed):
    """Draw random gradients, different at each step."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda leaf: jnp.asarray(draw(size=leaf.shape), leaf.dtype), params)


def steps(config, inner, params=None, jit=jax.jit):
    """Yield ``(params, allocator)`` after each step of a run with random gradients."""
    params = adapters(config) if params is None else params
    tx = al.adalora(lenient(inner), config)
    state, update = tx.init(params), jit(tx.update)
    for seed in range(config.total_step):
        updates, state = update(gradients(params, seed), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state.allocator
