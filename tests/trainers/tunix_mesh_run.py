"""A training run on one device and on a 4 x 2 mesh, started as a process by test_tunix.py."""

import json

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType

import adalora_jax as adalora
from adalora_jax._src.core import pytree
from trainers import tunix_models as tunix

CONFIG = adalora.AdaLoraConfig(
    total_step=4, tinit=1, tfinal=1, init_r=4, target_r=2, target_modules="all-linear"
)


def spread(model, mesh):
    """Place every weight according to its metadata, as in Tunix's examples."""
    model = nnx.clone(model)
    state = nnx.state(model)
    nnx.update(model, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
    return model


def results(run):
    def as_lists(tree):
        return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), tree)

    masks = as_lists(pytree.leaves_with_path(run.allocator.masks))
    adapters = adalora.nnx.adapters(run.model)
    return {"masks": masks, "adapters": {path: as_lists([*a]) for path, a in adapters.items()}}


def places(run):
    """Return the shardings of an adapter and of its optimizer state at the end."""
    at = lambda variable: list(variable[...].sharding.spec)
    pick = lambda node: {name: at(getattr(node, name)) for name in ("p", "q")}
    role = lambda state: state.stacked["layers/*/mlp/up_proj"]
    layer = lambda state: state["layers"][0]["mlp"]["up_proj"]["adalora"]
    named = lambda node: {name: at(node[name]) for name in ("p", "q")}
    state = run.trainer.optimizer.opt_state
    return {
        "parameter": pick(run.model.layers[0].mlp.up_proj.adalora),
        "moments": named(layer(state.inner[0].mu)),
        "sensitivity": pick(role(state.allocator.sensitivity)),
        "uncertainty": pick(role(state.allocator.uncertainty)),
    }


def main():
    alone = tunix.train(tunix.build("llama3", num_layers=1), CONFIG)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with mesh:
        run = tunix.train(spread(tunix.build("llama3", num_layers=1), mesh), CONFIG)
    print(json.dumps([[results(alone), results(run)], places(run)]))


if __name__ == "__main__":
    main()
