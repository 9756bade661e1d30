"""A training run that saves checkpoints and resumes from the last one, for test_checkpoint.

    python tests/resumable_run.py FOLDER RESULT [KILL_AT]

Trains to the end, from the last complete checkpoint under FOLDER if there is one, and writes the
final adapters and optimizer state to RESULT. With KILL_AT the process kills itself by SIGKILL right
after it has started to save that step, in the middle of the save.
"""

import os
import signal
import sys

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from support.toy_problem import adapters as fresh
from support.toy_problem import batches, train_step

import adalora_jax as adalora
from adalora_jax import checkpoint

CONFIG = adalora.AdaLoraConfig(
    total_step=12, init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, param_dtype="float32"
)


def main(folder, result, kill_at=None):
    tx = adalora.adalora(optax.adamw(0.02), CONFIG)
    step = jax.jit(train_step(tx, CONFIG))
    data = batches(CONFIG)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=2)
    with ocp.CheckpointManager(folder, options=options) as manager:
        if (last := manager.latest_step()) is None:
            adapters = fresh(CONFIG)
            start, state = 0, tx.init(adapters)
        else:
            saved = checkpoint.restore(os.path.join(folder, str(last)), tx, config=CONFIG)
            adapters, state, start = saved.adapters, saved.opt_state, saved.step
        print("from", start, flush=True)
        for t in range(start, CONFIG.total_step):
            batch = jax.tree.map(lambda a, t=t: a[t], data)
            adapters, state, _ = step(adapters, state, batch)
            args = checkpoint.save_args(adapters, state, CONFIG)
            saving = manager.save(t + 1, args=args)
            if saving and t + 1 == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    leaves = jax.tree.leaves(jax.device_get((adapters, state)))
    np.savez(result, *leaves)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
