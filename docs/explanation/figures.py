"""Draw the figures of ``rank-allocation.md``: ``python docs/explanation/figures.py``.

It writes ``budget.png`` and ``ranks.png`` to the folder of this file.
"""

from __future__ import annotations

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import adalora_jax as adalora
from adalora_jax import plot

HERE = Path(__file__).parent


def main() -> None:
    """Write both figures."""
    draw_budget().savefig(HERE / "budget.png")
    draw_ranks().savefig(HERE / "ranks.png")


def draw_budget() -> Figure:
    """Draw the three built-in schedules for 10 adapters, and the phases of a run."""
    base = adalora.AdaLoraConfig(total_step=1000, init_r=12, target_r=8, tinit=100, tfinal=300)
    figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps = np.arange(base.total_step)
    colours = {"cubic": "tab:blue", "linear": "tab:orange", "grow": "tab:green"}
    for schedule, colour in colours.items():
        config = base.replace(budget_schedule=schedule)
        values = adalora.budget(config, steps, n_adapters=10)
        label = f'budget_schedule="{schedule}"'
        axes.step(steps, values, where="post", color=colour, lw=2, label=label)
    shade_phases(axes, base, at=129)
    axes.set(xlim=(0, base.total_step), ylim=(0, 140), xlabel="step", ylabel="budget (triplets)")
    axes.legend(loc="lower right", frameon=False)
    return figure


def draw_ranks() -> Figure:
    """Train a small residual network with a mask every 10 steps, and draw its ranks."""
    config = adalora.AdaLoraConfig(
        total_step=200,
        init_r=6,
        target_r=2,
        tinit=20,
        tfinal=60,
        deltaT=10,
        scale=1.0,
        target_modules=["up", "down"],
    )
    infos, nonzero = train(config)
    figure = plot.rank_history(infos, title="ranks with deltaT=10")
    curves = figure.axes[0]
    edges = [*range(1, config.total_step + 2)]  # as in the infos: the number of updates so far
    curves.stairs(nonzero, edges, baseline=None, color="tab:blue", label="λ that are not 0")
    shade_phases(curves, config, at=2)
    curves.legend(loc="upper right", frameon=False)
    figure.set_dpi(120)
    return figure


class Block(nn.Module):
    """Residual block."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.gelu(nn.Dense(32, name="up")(x))
        return x + nn.Dense(32, name="down")(hidden)


class Model(nn.Module):
    """Classifier of four residual blocks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(4):
            x = Block(name=f"blocks_{i}")(x)
        return nn.Dense(10, name="head")(x)


def train(config: adalora.AdaLoraConfig) -> tuple[list, list[int]]:
    """Return the allocator's info and the number of λ other than 0 after every step."""
    model = Model()
    x = jax.random.normal(jax.random.key(0), (256, 32))
    y = jnp.argmax(x[:, :10] + x[:, 10:20], axis=-1)
    variables = model.init(jax.random.key(1), x)
    adapted = adalora.linen.adapt(model, config)
    adapters = adapted.init(jax.random.key(2), variables, x)
    tx = adalora.adalora(optax.adamw(1e-2), config)
    opt_state = tx.init(adapters)

    @jax.jit
    def step(adapters, opt_state):
        def loss(adapters):
            logits = adapted.apply(variables, adapters, x)
            task = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return task + adalora.orthogonality(adapters, config)

        updates, opt_state = tx.update(jax.grad(loss)(adapters), opt_state, adapters)
        return optax.apply_updates(adapters, updates), opt_state

    infos, nonzero = [], []
    for _ in range(config.total_step):
        adapters, opt_state = step(adapters, opt_state)
        infos.append(jax.device_get(adalora.info(opt_state)))
        nonzero.append(sum(int((adapter.lam != 0).sum()) for adapter in adapters.values()))
    return infos, nonzero


def shade_phases(axes: Axes, config: adalora.AdaLoraConfig, at: float) -> None:
    """Separate the three phases of a run by lines, and name them at the height ``at``."""
    start = 0
    for name, end in (
        ("warm-up", config.tinit),
        ("budgeting", config.final_step),
        ("final phase", config.total_step),
    ):
        axes.axvline(end, color="gray", lw=1, ls=":")
        axes.text((start + end) / 2, at, name, ha="center", color="dimgray")
        start = end


if __name__ == "__main__":
    main()
