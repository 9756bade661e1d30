"""Pictures of where the rank went: by layer and module, and over time.

Every function returns a :class:`matplotlib.figure.Figure` of its own, which a notebook shows and
``figure.savefig("ranks.png")`` writes; ``pyplot`` and its global state are not involved.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLOURS = "viridis"
_ROW = 0.24  # inches a row of text needs
_TALLEST = 14.0  # inches; beyond it rows get thinner and only some are labelled
_ITSELF = "·"  # the module name of an adapter that is the layer


def rank_heatmap(
    ranks: Mapping[str, int], *, highest: int | None = None, title: str | None = None
) -> Figure:
    """Ranks as a table of layers × modules, one coloured cell an adapter.

    The first number in a path is its layer, what follows is the module: ``blocks/0/query`` and
    ``blocks_0/query`` are both layer 0, module ``query``, and so is ``blocks/query[0]``, slice 0 of
    a stack. Paths without a number share one row.

    Args:
      ranks: ``{path: rank}``, as :func:`adalora_jax.ranks` gives.
      highest: the rank at the upper end of the colours, such as ``config.init_r``; without it
        the highest rank there is.
      title: above the table.

    Raises:
      ValueError: ``ranks`` is empty.

    >>> figure = rank_heatmap({"blocks/0/query": 2, "blocks/0/up": 5, "blocks/1/up": 7})
    >>> table = figure.axes[0]
    >>> [label.get_text() for label in table.get_xticklabels()]
    ['query', 'up']
    >>> [cell.get_text() for cell in table.texts]
    ['2', '5', '7']
    """
    if not ranks:
        raise ValueError("ranks={} is empty: pass what adalora_jax.ranks(state) gives.")
    places = {path: _place(path) for path in ranks}
    layers = sorted({layer for layer, _ in places.values()})
    modules = list(dict.fromkeys(module for _, module in places.values()))
    table = np.full((len(layers), len(modules)), np.nan)
    for path, (layer, module) in places.items():
        table[layers.index(layer), modules.index(module)] = ranks[path]

    height = min(0.9 + 1.4 * _ROW * len(layers), _TALLEST)
    figure = _figure(2.2 + 0.75 * len(modules), height + 0.5)
    axes = figure.subplots()
    image = axes.imshow(
        table, cmap=_COLOURS, vmin=0, vmax=highest or max(ranks.values()) or 1, aspect="auto"
    )
    for (row, column), rank in np.ndenumerate(table):
        if not np.isnan(rank):
            colour = "black" if np.asarray(image.norm(rank)) > 0.6 else "white"
            axes.text(
                column, row, f"{rank:.0f}", fontsize=9, ha="center", va="center", color=colour
            )
    turned = {"rotation": 45, "ha": "right"} if max(map(len, modules)) > 8 else {}
    axes.set_xticks(range(len(modules)), modules, fontsize=9, **turned)
    names = _layer_names(layers)
    _label_rows(axes, names, height)
    axes.set_ylabel("layer" if any(names) else "")
    axes.set_title(title or "rank of every adapter", fontsize=11)
    figure.colorbar(image, ax=axes, label="rank", ticks=MaxNLocator(integer=True))
    return figure


def rank_history(
    history: Iterable[Mapping[str, int]],
    *,
    steps: Sequence[int] | None = None,
    budget: Sequence[int] | None = None,
    highest: int | None = None,
    title: str | None = None,
) -> Figure:
    """The rank of every adapter over time, under the curve of their sum and of the budget.

    Args:
      history: one ``{path: rank}`` a step, as :func:`adalora_jax.ranks` gives.
      steps: the step each of them was taken at; without it they are numbered from 0.
      budget: the budget at each of them, ``allocator_state(opt_state).budget``.
      highest: as in :func:`rank_heatmap`.
      title: above the picture.

    Raises:
      ValueError: ``history`` is empty, its entries name different adapters, ``steps`` does not
        rise, or ``steps`` or ``budget`` has another length.

    >>> history = [{"query": 4, "up": 4}, {"query": 2, "up": 4}, {"query": 1, "up": 3}]
    >>> figure = rank_history(history, steps=[0, 10, 20], budget=[8, 6, 4])
    >>> curves, rows = figure.axes[:2]
    >>> [label.get_text() for label in rows.get_yticklabels()]
    ['query  1', 'up  3']
    """
    history = list(history)
    if not history or not history[0]:
        raise ValueError("history is empty: pass one {path: rank} a step.")
    paths = list(history[0])
    for index, entry in enumerate(history):
        if set(entry) != set(paths):
            raise ValueError(
                f"history[{index}] names other adapters than history[0]: "
                f"{sorted(set(entry) ^ set(paths))[:5]} are in one of them only."
            )
    steps = range(len(history)) if steps is None else steps
    for name, values in (("steps", steps), ("budget", budget)):
        if values is not None and len(values) != len(history):
            raise ValueError(
                f"{name} has {len(values)} entries for the {len(history)} of history: "
                "give one for each."
            )
    if any(after <= before for before, after in itertools.pairwise(steps)):
        raise ValueError("steps must rise from each entry of history to the next.")
    table = np.array([[entry[path] for entry in history] for path in paths])
    # A rank holds from its own step to the next one.
    edges = np.append(steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1)

    height = min(0.5 + _ROW * len(paths), _TALLEST)
    figure = _figure(9.0, height + 2.0)
    curves, rows = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, height])
    line = {"baseline": None, "fill": False}
    if budget is not None:
        curves.stairs(budget, edges, label="budget", color="tab:orange", lw=3, alpha=0.6, **line)
    curves.stairs(table.sum(axis=0), edges, label="live triplets", color="black", lw=1, **line)
    curves.set_ylim(bottom=0)
    curves.legend(fontsize=9, loc="lower left", frameon=False)
    curves.set_title(title or "rank of every adapter over time", fontsize=11)

    top = highest or int(table.max()) or 1
    image = rows.pcolormesh(
        edges, np.arange(len(paths) + 1) - 0.5, table, cmap=_COLOURS, vmin=0, vmax=top
    )
    rows.invert_yaxis()
    _label_rows(rows, [f"{path}  {history[-1][path]}" for path in paths], height)
    rows.set_xlabel("step")
    rows.set_ylabel("adapter and its last rank")
    figure.colorbar(image, ax=rows, label="rank", ticks=MaxNLocator(integer=True), pad=0.02)
    return figure


class _Figure(Figure):
    """A figure that a notebook shows although ``pyplot`` does not manage it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    return _Figure(figsize=(min(width, 16), height), dpi=100, layout="constrained")


def _label_rows(axes: Any, names: list[str], height: float) -> None:
    """Every row's name where there is room for it, else every second, third ... one."""
    stride = int(np.ceil(len(names) * 0.6 * _ROW / height))
    axes.set_yticks(range(0, len(names), stride), names[::stride], fontsize=8)


def _place(path: str) -> tuple[tuple[str, tuple[int, ...]], str]:
    """The layer, as a prefix and numbers (so that 10 sorts after 9), and the module of a path.

    >>> _place("encoder/layers_3/attention/query")
    (('encoder/layers', (3,)), 'attention/query')
    >>> _place("layers/query[3]"), _place("head")
    ((('', (3,)), 'layers/query'), (('', ()), 'head'))
    """
    names = path.split("/")
    for i, name in enumerate(names):
        if numbered := re.fullmatch(r"(.*?)_?(\d+)", name):
            prefix = "/".join([*names[:i], *filter(None, [numbered[1]])])
            return (prefix, (int(numbered[2]),)), "/".join(names[i + 1 :]) or _ITSELF
    if stacked := re.fullmatch(r"(.*)\[([\d,]+)\]", path):
        return ("", tuple(map(int, stacked[2].split(",")))), stacked[1]
    return ("", ()), path


def _layer_names(layers: list[tuple[str, tuple[int, ...]]]) -> list[str]:
    """The numbers alone where they say enough, else with what stands before them."""
    several = len({prefix for prefix, numbers in layers if numbers}) > 1
    names = []
    for prefix, numbers in layers:
        number = ",".join(map(str, numbers))
        names.append(f"{prefix}/{number}".strip("/") if several else number)
    return names
