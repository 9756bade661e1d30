"""One process of a multi-process training run with checkpoints, for test_multiprocess.py.

    export PYTHONPATH=tests
    python tests/compiled/multiprocess_run.py PORT COUNT INDEX FOLDER RESULT [KILL_AT]

Each process has its own part of every batch. They train to the end, from the last complete
checkpoint under FOLDER if there is one; process 0 writes the final state to RESULT. With KILL_AT
the last process kills itself by SIGKILL after that step.
"""

import functools
import os
import signal
import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.toy_problem import adapters as fresh
from support.toy_problem import batches, train_step

import adalora_jax as adalora
from adalora_jax import checkpoint

CONFIG = adalora.AdaLoraConfig(
    total_step=10, init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, param_dtype="float32"
)
SHAPES = {"down": (6, 4, ()), "layers": (4, 8, (4,))}
# Sharded over the processes: one adapter by the output axis of p, the other by its layers.
SPECS = {
    "down": adalora.Adapter(P(None, "d"), P(None), P(None, None)),
    "layers": adalora.Adapter(P("d", None, None), P("d", None), P("d", None, None)),
}


def main(folder, result, kill_at=None):
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = adalora.adalora(optax.adamw(0.02), CONFIG)
    init = lambda: fresh(CONFIG, shapes=SHAPES)
    abstract = jax.eval_shape(init), jax.eval_shape(lambda: tx.init(init()))
    specs = {path: a._replace(scale=CONFIG.scaling) for path, a in SPECS.items()}
    shardings = functools.partial(adalora.sharding.shardings, mesh=mesh)
    placed = shardings(abstract[0], specs), shardings(abstract[1], specs, tx=tx)
    target = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), abstract, placed
    )
    tokens = {"down": P("d", None), "layers": P(None, "d", None)}  # of x and target
    step = jax.jit(train_step(tx, CONFIG), out_shardings=(*placed, NamedSharding(mesh, P())))

    def batch(t):
        """Return the global batch of step t; this process makes only its own part."""
        with jax.default_device(jax.local_devices()[0]):
            part = jax.device_get(batches(CONFIG, jax.process_index(), SHAPES, tokens=2))
            kernels = jax.device_get(batches(CONFIG, 0, SHAPES, tokens=2))
        arrays = {}
        for name, (x, _, y) in part.items():
            kernel = multihost_utils.host_local_array_to_global_array(
                kernels[name][1][t], mesh, P()
            )
            x, y = (
                multihost_utils.host_local_array_to_global_array(a[t], mesh, tokens[name])
                for a in (x, y)
            )
            arrays[name] = x, kernel, y
        return arrays

    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        if (last := manager.latest_step()) is None:
            start, (adapters, state) = (
                0,
                jax.jit(lambda: (init(), tx.init(init())), out_shardings=placed)(),
            )
        else:
            saved = checkpoint.restore(
                os.path.join(folder, str(last)), target=target, config=CONFIG
            )
            start, adapters, state = saved.step, saved.adapters, saved.opt_state
        print("from", start, flush=True)
        for t in range(start, CONFIG.total_step):
            adapters, state, _ = step(adapters, state, batch(t))
            if t + 1 == kill_at and jax.process_index() == jax.process_count() - 1:
                manager.wait_until_finished()
                jax.block_until_ready(state)
                os.kill(os.getpid(), signal.SIGKILL)
            manager.save(t + 1, args=checkpoint.save_args(adapters, state, CONFIG))
    whole = multihost_utils.process_allgather((adapters, state), tiled=True)
    masks = multihost_utils.process_allgather(
        [np.asarray(s.data) for s in state.allocator.masks["down"].addressable_shards]
    )
    assert all((mask == m[0]).all() for m in masks for mask in m)
    if jax.process_index() == 0:
        np.savez(result, *jax.tree.leaves(whole))


if __name__ == "__main__":
    port, count, index = sys.argv[1:4]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(count), int(index), heartbeat_timeout_seconds=10
    )
    main(*sys.argv[4:6], *map(int, sys.argv[6:]))
