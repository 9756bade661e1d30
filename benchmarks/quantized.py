"""Cost of a quantised base: bytes, and the peak memory and time of a training step.

    python -m benchmarks.quantized

The 7B model exists only as shapes: its training step is compiled, not run. The small model is run,
with the steps of all bases interleaved. Takes about two minutes on two idle cores. Needs
``pip install ".[quant]"``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import adalora_jax as adalora
from adalora_jax import quantization
from benchmarks import results, timing

CONFIG = adalora.AdaLoraConfig(
    total_step=1000, init_r=12, target_r=8, tinit=100, tfinal=300, target_modules="all-linear"
)
TX = adalora.adalora(optax.adamw(1e-3), CONFIG)
ROUNDS = 9
UNITS = {"GB": 1e9, "MB": 1e6}
BASES = ("float32", "bfloat16", "int8", "int4", "nf4")
LLAMA = {"width": 4096, "hidden": 11008, "heads": 32, "depth": 32, "vocabulary": 32000}
SMALL = {"width": 512, "hidden": 1376, "heads": 8, "depth": 4, "vocabulary": 1000}


class Layer(nn.Module):
    """Layer of a Llama: its linear layers in their shapes, without rotary positions."""

    width: int
    hidden: int
    heads: int

    @nn.compact
    def __call__(self, x, _=None):
        dense = functools.partial(nn.Dense, use_bias=False)

        def split(y):
            return y.reshape(*y.shape[:-1], self.heads, -1)

        h = nn.RMSNorm(name="attention_norm")(x)
        q, k, v = (split(dense(self.width, name=n)(h)) for n in ("q_proj", "k_proj", "v_proj"))
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + dense(self.width, name="o_proj")(h)
        h = nn.RMSNorm(name="mlp_norm")(x)
        h = nn.silu(dense(self.hidden, name="gate_proj")(h)) * dense(self.hidden, name="up_proj")(h)
        return x + dense(self.width, name="down_proj")(h), None


class Llama(nn.Module):
    """Llama whose layers are under ``nn.scan`` with recomputed activations, as in large models."""

    width: int
    hidden: int
    heads: int
    depth: int
    vocabulary: int

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(self.vocabulary, self.width, name="embed_tokens")(ids)
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
        )
        x, _ = layers(self.width, self.hidden, self.heads, name="layers")(x, None)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="lm_head")(x)


def based(model: nn.Module, variables, base: str, ids):
    """Return the model and its variables, cast to a float dtype, or quantised from bf16."""
    dtype = base if base.startswith(("float", "bfloat")) else "bfloat16"
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    if base == dtype:
        return model, variables
    recipe = quantization.Recipe(qtype=base, exclude_modules=["lm_head"])
    return quantization.quantize(model, recipe, variables, ids)


def abstract(model: nn.Module, base: str, ids):
    """Return the model on a base, and the shapes of its variables."""
    models = []

    def make():
        variables = model.init(jax.random.key(0), ids)
        found, variables = based(model, variables, base, ids)
        models.append(found)
        return variables

    variables = jax.eval_shape(make)
    return models[0], variables


def train_step(adapted):
    """Return a jitted training step in the usual form."""

    def step(variables, adapters, opt, ids):
        def loss(adapters):
            logits = adapted.apply(variables, adapters, ids[:, :-1]).astype(jnp.float32)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
            return losses.mean() + adalora.orthogonality(adapters, CONFIG)

        value, grads = jax.value_and_grad(loss)(adapters)
        updates, opt = TX.update(grads, opt, adapters)
        return optax.apply_updates(adapters, updates), opt, value

    return jax.jit(step, donate_argnums=(1, 2))


def size(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_of(variables, adapters, opt, step=None) -> dict[str, int]:
    """Return the bytes of a run's arrays, and the temporaries and peak of its compiled step."""
    found = {"base": size(variables), "adapters": size(adapters), "training state": size(opt)}
    if step is not None:
        memory = step.memory_analysis()
        found["temporaries"] = memory.temp_size_in_bytes
        found["peak"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return found


def shapes_only(shape: dict[str, int], batch: int, length: int, compiled: Sequence[str]):
    """Return :func:`bytes_of` on each base, for a model of shapes without arrays."""
    ids = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    result = {}
    for base in BASES:
        model, variables = abstract(Llama(**shape), base, jnp.zeros((1, 2), jnp.int32))
        adapted = adalora.linen.adapt(model, CONFIG)
        adapters = jax.eval_shape(adapted.init, jax.random.key(0), variables, ids)
        arguments = variables, adapters, jax.eval_shape(TX.init, adapters)
        step = train_step(adapted).lower(*arguments, ids).compile() if base in compiled else None
        result[base] = bytes_of(*arguments, step)
    return result


def measured(shape: dict[str, int], batch: int, length: int):
    """Return :func:`bytes_of` on each base, and the median milliseconds of a training step."""
    ids = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, shape["vocabulary"])
    variables = Llama(**shape).init(jax.random.key(0), ids)
    sizes, steps = {}, {}
    for base in BASES:
        model, given = based(Llama(**shape), variables, base, ids)
        adapted = adalora.linen.adapt(model, CONFIG)
        adapters = adapted.init(jax.random.key(2), given, ids)
        state = [adapters, TX.init(adapters)]
        step = train_step(adapted).lower(given, *state, ids).compile()
        sizes[base] = bytes_of(given, *state, step)

        def run(step=step, given=given, state=state):
            *state[:], value = step(given, *state, ids)
            return value

        steps[base] = run
    return sizes, timing.medians(timing.in_rounds(steps, ROUNDS))


def table(sizes: dict[str, dict[str, int]], unit: str) -> str:
    columns = list(sizes["bfloat16"])
    rows = [("base", *(f"{column}, {unit}" for column in columns), "base / bfloat16 base")]
    for base, found in sizes.items():
        cells = (results.number(found[c] / UNITS[unit]) if c in found else "" for c in columns)
        rows.append((base, *cells, f"{found['base'] / sizes['bfloat16']['base']:.2f}"))
    return results.markdown(rows)


def text(found: results.Results) -> str:
    times = found["milliseconds per step"]
    rows = [("base", "milliseconds per step", "time / bfloat16", "time / float32")]
    for base, ms in times.items():
        ratios = (f"{ms / times[other]:.2f}" for other in ("bfloat16", "float32"))
        rows.append((base, results.number(ms), *ratios))
    return "\n\n".join(
        [
            "# Cost of a quantised base",
            "The benchmark compares AdaLoRA on a Llama whose frozen base is float32, bfloat16, or "
            "quantised to int8, int4 or NF4. Embeddings and output layer remain in bfloat16 in a "
            "quantised base. A model with 7 billion parameters is compiled from shapes, and not "
            "run; a small one is also timed.",
            "The training state is that of the optimizer and the allocator. Temporaries exist "
            "during a step, and the peak is the sum of base, adapters, state and temporaries; both "
            "are empty where the step was not compiled. A CPU has no arithmetic in bfloat16, so "
            "the program stores a float32 copy of the whole bfloat16 base among the temporaries. "
            "Of a quantised base it dequantises one weight at a time. The peaks therefore "
            "differ more here than on a GPU or TPU, but the sizes of the bases are the same there.",
            "## 7 billion parameters, one sequence of 512 tokens\n\n" + table(found["7B"], "GB"),
            "## 4 layers of width 512, 4 sequences of 128 tokens\n\n" + table(found["small"], "MB"),
            f"## Time of a training step of the small model\n\nThe times are medians of "
            f"{found['rounds']} interleaved rounds. The bases take the same time, within the "
            "noise of these measurements.\n\n" + results.markdown(rows),
            results.ending("quantized", found),
        ]
    )


def main() -> None:
    large = shapes_only(LLAMA, batch=1, length=512, compiled=("bfloat16", "nf4"))
    small, times = measured(SMALL, batch=4, length=128)
    found = {"rounds": ROUNDS, "7B": large, "small": small, "milliseconds per step": times}
    results.finish("quantized", found, text)


if __name__ == "__main__":
    main()
