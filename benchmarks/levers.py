"""Savings of two possible optimisations: compaction during training, and bfloat16 averages.

    python benchmarks/levers.py [--lever compaction averages] [--rounds 9]

Compaction: in the final phase, pruned triplets are multiplications by 0. The benchmark measures, in
turn, a step of the frozen model, of AdaLoRA at rank 12 whose final mask kept a third of the
triplets, of the same after ``compact``, and of LoRA at rank 4.

Averages in bfloat16 halve the memory of the allocator. With rounding to nearest they may stall, if
a new value changes an average by less than half of its last bit. Stochastic rounding is unbiased;
its cost is the random bits. The benchmark measures the time to update the averages of a model with
7 billion parameters, and the effect on the masks: during one training run (the demo's), the share
of the triplets kept with float32 averages that is also kept with the rounded ones.

The table and numbers are written to ``--out``; without it, those of a complete run are written next
to this file. Takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import allocator
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
import timing
import training
from networks import Shape

import adalora_jax as adalora
from adalora_jax._src.core import pytree
from adalora_jax._src.core.allocator import update_allocator
from adalora_jax._src.core.low_rank import _mixed
from adalora_jax._src.core.scores import smooth_batch
from adalora_jax.demo import in_linen
from adalora_jax.demo.data import batches, load
from adalora_jax.demo.methods import adaptations, pretraining

LEVERS = ("compaction", "averages")
KEPT = 4  # triplets per matrix
MODELS = ("bert", "llama")


def compaction(rounds: int, **changes: Any) -> tuple[dict[str, Any], str]:
    """Return the milliseconds per step of each variant on each model, and the table."""
    found = {}
    for name in MODELS:
        shape = training.CPU[name].replace(**changes)
        full = peers.PEERS["adalora"](shape, peers.RANK, 0.0)
        masked, compacted = after_the_end(shape, full)
        steps = {
            "frozen model": peers.build("frozen", shape),
            f"AdaLoRA, rank {peers.RANK}, masked": masked,
            "AdaLoRA, compacted": compacted,
            f"LoRA, rank {KEPT}": peers.build("lora", shape, KEPT),
        }
        found[name] = timing.in_rounds(steps, rounds)
    rows = [("", *(f"{name}: ms a step, / frozen" for name in found))]
    for step in next(iter(found.values())):
        cells = []
        for times in found.values():
            ratio = timing.ratio(times[step], times["frozen model"])
            cells.append(f"{timing.medians(times)[step]:.0f}, {ratio:.2f}")
        rows.append((step, *cells))
    return found, f"**Compaction in the final phase**\n\n{timing.markdown(rows)}"


def after_the_end(shape: Shape, peer: peers.Peer) -> tuple[peers.Step, peers.Step]:
    """Return steps of the final phase with ``KEPT`` triplets per matrix: masked, and compacted."""
    config = peers.config(shape, peers.RANK, 0.0).replace(tfinal=50_000, target_r=KEPT)
    peer = peer._replace(tx=adalora.adalora(peers.ADAMW, config))
    masked = peers.Step(peer, peers.data(shape))
    trainable, opt, key = masked.state
    done = opt.allocator._replace(
        step=jnp.asarray(config.final_step + 1, jnp.int32),
        masks=jax.tree.map(
            lambda mask: mask & (jnp.arange(peers.RANK) < KEPT), opt.allocator.masks
        ),
    )
    masked.state = trainable, opt._replace(allocator=done), key
    small, small_opt = adalora.compact(trainable, masked.state[1], peer.tx)
    compacted = peers.Step(peer._replace(trainable=small), peers.data(shape))
    # Both steps donate their state, so they must not share the arrays that were not cut.
    compacted.state = jax.tree.map(jnp.copy, (small, small_opt, key))
    return masked, compacted


def averages(rounds: int, steps: int = 200) -> tuple[dict[str, Any], str]:
    """Return the milliseconds per update and the masks' agreement with float32, and the table."""
    case = allocator.CASES["7b"]
    weights, gradients = (list(allocator.random_adapters(case, seed).values()) for seed in range(2))
    updates = {name: Update(weights, gradients, name) for name in ROUNDED}
    times = timing.in_rounds(updates, rounds)
    kept = {name: sum(a.nbytes for a in jax.tree.leaves(u.state)) for name, u in updates.items()}
    shares = agreement(steps)
    rows = [("", "ms an update", "MB kept", "of the kept triplets: on average", "at least")]
    for name, update in timing.medians(times).items():
        share = shares[name]
        agreed = (f"{100 * value:.2f} %" for value in (np.mean(share), min(share)))
        rows.append((name, f"{update:.1f}", f"{kept[name] / 1e6:.0f}", *agreed))
    text = f"**Averages in bfloat16**\n\n{timing.markdown(rows)}"
    return {"milliseconds": times, "bytes": kept, "agreement": shares}, text


def nearest(key: jax.Array, average: jax.Array) -> jax.Array:
    # ``astype`` alone does not round: XLA removes a conversion that is followed by its inverse.
    return jax.lax.reduce_precision(average, 8, 7).astype(jnp.bfloat16)


def stochastic(key: jax.Array, average: jax.Array) -> jax.Array:
    """Round to bfloat16, up or down at random such that the result is unbiased.

    The random bits are a hash of the position, as for dropout: ``jax.random`` takes ten times as
    long.
    """
    bits = jax.lax.bitcast_convert_type(average, jnp.uint32)
    place = jax.lax.iota(jnp.uint32, average.size).reshape(average.shape)
    lower = _mixed(place * jnp.uint32(0x9E3779B9) ^ jax.random.key_data(key)[0]) & 0xFFFF
    upper = jax.lax.shift_right_logical(bits + lower, jnp.uint32(16)).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


ROUNDED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "float32": lambda key, average: average,
    "bfloat16, to nearest": nearest,
    "bfloat16, stochastic": stochastic,
}


class Update:
    """Both averages of all adapters; a call updates them with one gradient."""

    def __init__(self, weights: Any, gradients: Any, name: str):
        self.key = jax.random.key(0)
        zero = lambda leaf: ROUNDED[name](self.key, jnp.zeros_like(leaf))
        self.state = tuple(jax.tree.map(zero, weights) for _ in range(2))

        def update(key, state):
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state)
            pairs = smooth_batch(weights, gradients, *wide, allocator.CONFIG)
            key, use = jax.random.split(key)
            return key, rounded(name, use, tuple(list(part) for part in zip(*pairs)))

        self.call = jax.jit(update, donate_argnums=(0, 1))

    def __call__(self) -> Any:
        self.key, self.state = self.call(self.key, self.state)
        return self.state


def rounded(name: str, key: jax.Array, averages: Any) -> Any:
    """Round all arrays with the same key, so that arrays of one shape share a compiled kernel."""
    return jax.tree.map(functools.partial(ROUNDED[name], key), averages)


def agreement(steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Return, per mask, the share of the triplets kept with float32 that each rounding keeps.

    All of them see the same weights and gradients: those of the run with float32 averages.
    """
    method = next(method for method in adaptations(steps) if method.adaptive)
    config, optimizer = method.config, method.optimizer
    assert config is not None
    train, _ = load(range(5), seed)
    base = in_linen.Learner(in_linen.create(seed), pretraining(steps), seed)
    for batch in batches(train, steps, seed):
        base.step(batch.pixels, batch.digits)
    model = adalora.linen.adapt(in_linen.VisionTransformer(), config)
    train, _ = load(range(5, 10), seed)
    first = model.init(jax.random.key(seed), base.base, jnp.zeros((1, 8, 8)))

    @jax.jit
    def step(adapters, opt, others, key, pixels, digits):
        def loss(adapters):
            logits = model.apply(base.base, adapters, pixels)
            return in_linen.cross_entropy(logits, digits) + method.penalty(adapters)

        grads = jax.grad(loss)(adapters)
        updates, opt = optimizer.update(grads, opt, adapters)
        adapters = optax.apply_updates(adapters, updates)
        given = pytree.extract_adapters(adapters), pytree.extract_adapters(grads)
        for name, state in others.items():
            now = update_allocator(state, *given, state.step)
            pair = rounded(
                name, jax.random.fold_in(key, state.step), (now.sensitivity, now.uncertainty)
            )
            pair = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), pair)
            others[name] = now._replace(sensitivity=pair[0], uncertainty=pair[1])
        return adapters, opt, others

    opt = optimizer.init(first)
    start = adalora.allocator_state(opt)
    others = dict.fromkeys(ROUNDED, start)
    shares: dict[str, list[float]] = {name: [] for name in ROUNDED}
    adapters, key, before = first, jax.random.key(seed), start.masks
    for batch in batches(train, steps, seed):
        adapters, opt, others = step(adapters, opt, others, key, batch.pixels, batch.digits)
        masks = others["float32"].masks
        if _live(masks) < _live(before):
            for name, state in others.items():
                both = jax.tree.map(jnp.logical_and, masks, state.masks)
                shares[name].append(_live(both) / _live(masks))
        before = masks
    return shares


def _live(masks: Any) -> int:
    return sum(int(mask.sum()) for mask in jax.tree.leaves(masks))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lever", nargs="+", choices=LEVERS, default=list(LEVERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, help="of the models, instead of their own")
    parser.add_argument("--depth", type=int, help="likewise")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)

    given = {"width": chosen.width, "depth": chosen.depth}
    changes = {name: value for name, value in given.items() if value}
    results, parts = {}, []
    if "compaction" in chosen.lever:
        results["compaction"], text = compaction(chosen.rounds, **changes)
        parts.append(text)
    if "averages" in chosen.lever:
        results["averages"], text = averages(chosen.rounds)
        parts.append(text)
    about = timing.machine()
    parts.append(
        f"Medians of {chosen.rounds} rounds in which all take turns. {about['processor']}, "
        f"{about['cores']} cores, {about['device']}, JAX {about['jax']}."
    )
    everything = set(chosen.lever) == set(LEVERS) and not changes
    place = chosen.out or (pathlib.Path(__file__).parent if everything else None)
    if place is None:
        print("\n\n".join(parts))
        return
    timing.save(timing.place(place, "levers"), results, "\n\n".join(parts))


if __name__ == "__main__":
    main()
