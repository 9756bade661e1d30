"""Layers that cannot be adapted: the error names the layer and the reason."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from support.small_models import IDS, Tied, adapted_of, draw

import adalora_jax as adalora


class Mapped(nn.Module):
    """A layer whose parameters pass through nn.map_variables."""

    @nn.compact
    def __call__(self, x):
        def centre(params):
            return jax.tree.map(lambda w: w - w.mean(), params)

        mapped = nn.map_variables(
            nn.Dense, "params", trans_in_fn=centre, mutable=self.is_initializing()
        )
        return mapped(4, name="dense")(x)


@pytest.mark.parametrize(
    ("model", "x", "targets", "message"),
    [
        (
            Tied("by hand"),
            IDS,
            ["embed"],
            "'embed' cannot be adapted, because its weight is also used",
        ),
        (
            Tied("applied"),
            IDS,
            ["embed"],
            "'embed' cannot be adapted, because its weight is also used",
        ),
        (Tied("applied"), IDS, ["head"], "'head' matches no module"),
        (Mapped(), draw(2, 4), ["dense"], r"'dense' cannot be adapted.*nn\.map_variables"),
        (Mapped(), draw(2, 4), ".*", r"selects no layer.*'dense'.*nn\.map_variables"),
    ],
)
def test_layer_that_cannot_be_adapted_raises(model, x, targets, message):
    with pytest.raises(ValueError, match=message):
        adapted_of(model, x, targets)


@pytest.mark.parametrize("wrapper", ["SpectralNorm", "WeightNorm"])
def test_wrapper_that_normalises_adapters_is_named_in_error(wrapper):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(6, name="d")
            if wrapper == "SpectralNorm":
                return nn.SpectralNorm(dense)(x, update_stats=False)
            return nn.WeightNorm(dense, variable_filter=None)(x)

    with pytest.raises(
        ValueError, match=f"'d' cannot be adapted, because it is inside of {wrapper}"
    ):
        adapted_of(Model(), draw(2, 4), ["d"])


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_stack_along_axis_other_than_first_raises(axis):
    class Stacked(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
            return nn.vmap(nn.Dense, **stack)(4, use_bias=False, name="layers")(x)

    config = adalora.AdaLoraConfig(total_step=3, init_r=4, target_r=2, target_modules=["layers"])
    x = jnp.ones((4, 3, 4))
    variables = Stacked().init(jax.random.key(0), x)
    with pytest.raises(
        ValueError, match=r"'layers' cannot be adapted, because nn\.vmap stacks its weight"
    ):
        adalora.linen.adapt(Stacked(), config).init(jax.random.key(1), variables, x)


class Named(nn.Module):
    name_of_layer: str

    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name=self.name_of_layer)(x)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a/b", "there is a '/' in its name"), ("adalora", "has a module called 'adalora'")],
)
def test_ambiguous_module_names_raise(name, message):
    config = adalora.AdaLoraConfig(total_step=3, target_modules="all-linear")
    model, x = Named(name), jnp.ones((2, 6))
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        adalora.linen.adapt(model, config).init(jax.random.key(1), variables, x)
