"""Every layer kind on a quantised base equals it on the dequantised base, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adalora_jax as adalora
from adalora_jax import quantization
from adalora_jax._src.core.pytree import is_packed
from adalora_jax._src.modules import linen_layers
from adalora_jax._src.modules.nnx_variables import pure
from modules import linen_adapted, linen_cases, nnx_cases
from modules.checks import close, random_like
from modules.test_layers_stacked import LINEN, NNX

pytestmark = [
    pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated"),
]

LINEN_CASES = {**linen_cases.CASES, **LINEN}
NNX_CASES = {**nnx_cases.CASES, **NNX}
LINEN_QUICK = [
    "dense-subclass",
    "self-attention",
    "experts-all-tokens",
    "tied-head",
    "conv-2d-explicit-groups",
    "scan-vmap",
]
NNX_QUICK = ["linear-subclass", "conv-depthwise", "tied-weights", "vmap"]


def recipes(cases, quick):
    """Yield each case with each recipe; shorter runs take one per case, and fewer cases."""
    for i, kind in enumerate(cases):
        for j, qtype in enumerate(("int8", "int4", "nf4")):
            rare = pytest.mark.slow if i % 3 == j else pytest.mark.exhaustive
            yield pytest.param(kind, qtype, marks=() if kind in quick and i % 3 == j else rare)


def gradients(apply, cotangents):
    def loss(params, adapters, inputs):
        found = apply(params, adapters, *inputs)
        return optax.tree_utils.tree_vdot(cotangents, found), found

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True))


def dequantised(tree):
    dense = lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf
    return jax.tree.map(dense, tree, is_leaf=is_packed)


def inputs_of(case):
    return tuple(
        value
        if isinstance(value, np.ndarray)
        else random_like(np.zeros(value, "float32"), i, std=1)
        for i, value in enumerate(case.inputs)
    )


@pytest.mark.parametrize(("kind", "qtype"), list(recipes(LINEN_CASES, LINEN_QUICK)))
def test_linen_layer_on_quantized_base_equals_dequantized_base(kind, qtype):
    case = LINEN_CASES[kind]
    case = case() if callable(case) else case
    inputs = inputs_of(case)
    variables = linen_adapted.adapt_case(case, "float32").base
    variables = jax.tree.map(jnp.asarray, variables)
    config = adalora.AdaLoraConfig(
        total_step=4, init_r=3, target_r=1, lora_alpha=6, target_modules=case.targets
    )
    recipe = quantization.Recipe(qtype=qtype, target_modules=case.targets)
    quantize = lambda m: quantization.quantize(m, recipe, variables, *inputs, **case.call)
    model, packed = quantize(case.module)
    dense = {**variables, "params": dequantised(linen_layers.join_quantized(packed)["params"])}
    assert jax.tree.structure(dense) == jax.tree.structure(variables)
    adapted, plain = (adalora.linen.adapt(m, config) for m in (model, case.module))
    adapters = random_like(
        jax.eval_shape(lambda: adapted.init(jax.random.key(0), packed, *inputs, **case.call)), 2
    )
    assert quantize(plain)[0] == adapted
    outputs = jax.eval_shape(lambda: case.module.apply(dense, *inputs, **case.call))
    both = functools.partial(gradients, cotangents=random_like(outputs, 1))
    (_, found), ours = both(
        lambda p, a, *xs: adapted.apply({**packed, "params": p}, a, *xs, **case.call)
    )(packed["params"], adapters, inputs)
    (_, expected), theirs = both(
        lambda p, a, *xs: plain.apply({**variables, "params": p}, a, *xs, **case.call)
    )(dense["params"], adapters, inputs)
    close(found, expected, 1e-6)
    close(ours[1:], theirs[1:], 2e-6)
    close_together(ours[0], theirs[0])


def named(tree):
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def close_together(ours, theirs):
    """Compare the float parameters' gradients, relative to the largest entry of all of them.

    Some are zero up to rounding, such as that of the key bias in attention.
    """
    ours, theirs = named(ours), named(theirs)
    size = max((float(np.abs(theirs[path]).max()) for path in ours), default=0)
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], rtol=0, atol=2e-6 * size, err_msg=path)


@pytest.mark.parametrize(("kind", "qtype"), list(recipes(NNX_CASES, NNX_QUICK)))
def test_nnx_layer_on_quantized_base_equals_dequantized_base(kind, qtype):
    case = NNX_CASES[kind]
    case = case() if not hasattr(case, "make") else case
    inputs = inputs_of(case)
    model = case.make(nnx.Rngs(0))
    model.eval()
    nnx.update(model, random_like(nnx.state(model, nnx.Param), 9))
    config = adalora.AdaLoraConfig(
        total_step=4, init_r=3, target_r=1, lora_alpha=6, target_modules=case.targets
    )
    recipe = quantization.Recipe(qtype=qtype, target_modules=case.targets)
    quantised = quantization.quantize(model, recipe, *inputs)
    plain = nnx.clone(model)
    params, packed = nnx.state(plain, nnx.Param), nnx.state(quantised)
    nnx.update(plain, filled(params, packed))
    ours = adalora.nnx.adapt(quantised, config, nnx.Rngs(1))
    theirs = adalora.nnx.adapt(plain, config, nnx.Rngs(1))
    other = quantization.quantize(adalora.nnx.adapt(model, config, nnx.Rngs(1)), recipe, *inputs)
    assert nnx.split(other)[0] == nnx.split(ours)[0]
    adapters = random_like(adalora.nnx.adapters(ours), 2)
    graph, state = nnx.split(plain)
    outputs = jax.eval_shape(lambda s: nnx.merge(graph, s, copy=True)(*inputs), state)
    cotangents = random_like(outputs, 1)
    results = []
    for adapted in (ours, theirs):
        adalora.nnx.set_adapters(adapted, adapters)
        graph, params, rest = nnx.split(adapted, nnx.Param, ...)
        run = lambda p, _, *xs, graph=graph, rest=rest: nnx.merge(graph, p, rest, copy=True)(*xs)
        results.append(gradients(run, cotangents)(params, {}, inputs))
    ((_, found), grads), ((_, expected), expected_grads) = results
    close(found, expected, 1e-6)
    close_together(pure(grads[0]), pure(expected_grads[0]))
    close(grads[2], expected_grads[2], 2e-6)
    assert any("lam" in path for path in named(pure(grads[0])))


def filled(params, packed):
    """Return the float model's state with the quantised model's dequantised weights."""
    flat = dict(nnx.to_flat_state(packed))
    new = [
        (path, variable.replace(dequantised(flat[path].get_raw_value())))
        for path, variable in nnx.to_flat_state(params)
    ]
    return nnx.from_flat_state(new)
