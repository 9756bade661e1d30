"""Pictures of what the allocator did: where the rank went, when, and by which scores.

A run is drawn from a list of what :func:`adalora_jax.info` gave, one a step or one every so many
steps; they may stay on the device until then. ``jax.lax.scan`` stacks them into one, which will do
as well. Every function returns a :class:`matplotlib.figure.Figure` of its own, which a notebook
shows and ``figure.savefig("ranks.png")`` writes; ``pyplot`` and its global state are not involved.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from adalora_jax._src.core import evaluation, pytree
from adalora_jax._src.core.monitor import AllocatorInfo

_COLOURS = "viridis"
_BUDGET = {"label": "budget", "color": "tab:orange", "lw": 3, "alpha": 0.6}
_LIVE = {"label": "live triplets", "color": "black", "lw": 1}
_WIDTH = 9.0  # inches, of a picture over time
_ROW = 0.24  # inches a row of text needs
_TALLEST = 14.0  # inches; beyond it rows get thinner and only some are labelled
_ITSELF = "·"  # the module name of an adapter that is the layer


def rank_heatmap(
    ranks: Mapping[str, int] | AllocatorInfo,
    *,
    highest: int | None = None,
    title: str | None = None,
) -> Figure:
    """Ranks as a table of layers × modules, one coloured cell an adapter.

    The first number in a path is its layer, what follows is the module: ``blocks/0/query`` and
    ``blocks_0/query`` are both layer 0, module ``query``, and so is ``blocks/query[0]``, slice 0 of
    a stack. Paths without a number share one row.

    Args:
      ranks: ``{path: rank}``, as :func:`adalora_jax.ranks` gives; or an :class:`AllocatorInfo`.
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
    ranks = _ranks(ranks)
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
    history: Iterable[Mapping[str, int]] | Iterable[AllocatorInfo] | AllocatorInfo,
    *,
    steps: Sequence[int] | None = None,
    budget: Sequence[int] | None = None,
    highest: int | None = None,
    title: str | None = None,
) -> Figure:
    """The rank of every adapter over time, under the curve of their sum and of the budget.

    Args:
      history: infos, which bring their own steps and budgets; or one ``{path: rank}`` a step, as
        :func:`adalora_jax.ranks` gives.
      steps: the step each of those was taken at; without it they are numbered from 0.
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
    infos, history = _infos(history)
    if infos:
        steps, budget = _steps(infos), [int(info.budget) for info in infos]
        history = [_ranks(info) for info in infos]
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
    figure, curves, rows = _over_rows(len(paths), title or "rank of every adapter over time")
    edges = _edges(steps)
    if budget is not None:
        _stairs(curves, budget, edges, **_BUDGET)
    _stairs(curves, table.sum(axis=0), edges, **_LIVE)
    curves.set_ylim(bottom=0)
    curves.legend(fontsize=9, loc="lower left", frameon=False)
    colours = {"vmin": 0, "vmax": highest or int(table.max()) or 1}
    image = _coloured(
        rows, edges, table, [f"{path}  {history[-1][path]}" for path in paths], colours
    )
    rows.set_ylabel("adapter and its last rank")
    figure.colorbar(image, ax=rows, label="rank", ticks=MaxNLocator(integer=True), pad=0.02)
    return figure


def rank_curves(
    infos: Iterable[AllocatorInfo] | AllocatorInfo, *, title: str | None = None
) -> Figure:
    """Budget and live triplets over time, and how the ranks of the adapters spread.

    The second picture has the mean rank, the middle half of all matrices and the range from the
    lowest rank to the highest, so it is as easy to read for a thousand matrices as for ten.

    Args:
      infos: of the run, see the head of this module.
      title: above the picture.

    Raises:
      ValueError: ``infos`` is empty, has other things in it, or steps that do not rise.

    >>> masks = [np.array([[True, True], [True, last]]) for last in (True, False)]
    >>> infos = [AllocatorInfo(i, 4 - i, 4 - i, {"up": m}, {}) for i, m in enumerate(masks)]
    >>> totals, spread = rank_curves(infos).axes
    >>> [line.get_label() for line in spread.patches]
    ['lowest to highest', 'middle half', 'mean']
    """
    infos = _checked(infos)
    edges = _edges(_steps(infos))
    ranks = np.array([list(_ranks(info).values()) for info in infos])
    figure = _figure(_WIDTH, 4.2)
    totals, spread = figure.subplots(2, 1, sharex=True)
    _stairs(totals, [int(info.budget) for info in infos], edges, **_BUDGET)
    _stairs(totals, ranks.sum(axis=1), edges, **_LIVE)
    totals.set_ylabel("triplets")
    totals.set_title(title or "budget and ranks over time", fontsize=11)
    lowest, *quarters, highest = np.quantile(ranks, (0, 0.25, 0.75, 1), axis=1)
    band = {"fill": True, "color": "tab:blue", "lw": 0}
    spread.stairs(highest, edges, baseline=lowest, label="lowest to highest", alpha=0.15, **band)
    spread.stairs(quarters[1], edges, baseline=quarters[0], label="middle half", alpha=0.35, **band)
    _stairs(spread, ranks.mean(axis=1), edges, label="mean", color="tab:blue", lw=1.5)
    spread.set_ylabel("rank of an adapter")
    spread.set_xlabel("step")
    for axes in (totals, spread):
        axes.set_ylim(bottom=0)
        axes.set_xlim(edges[0], edges[-1])
        axes.legend(fontsize=9, loc="lower left", frameon=False)
    return figure


def importance_history(
    infos: Iterable[AllocatorInfo] | AllocatorInfo, *, title: str | None = None
) -> Figure:
    """How much every adapter matters over time: the sum of its triplets' scores, in log colours.

    The colours span six orders of magnitude at most; what is below has the darkest one.

    Above it the scores a triplet is up against: the highest, the mean of those that live, and the
    lowest of those, below which triplets are pruned.

    Args:
      infos: of the run, see the head of this module.
      title: above the picture.

    Raises:
      ValueError: ``infos`` is empty, has other things in it, or steps that do not rise.

    >>> masks = {"up": np.array([True, False])}
    >>> scores = [{"up": np.array([4.0, 2.0]) / (1 + i)} for i in range(3)]
    >>> infos = [AllocatorInfo(i, 1, 1, masks, score) for i, score in enumerate(scores)]
    >>> curves, rows, _ = importance_history(infos).axes
    >>> rows.collections[0].get_array().data.tolist()
    [[6.0, 3.0, 2.0]]
    """
    infos = _checked(infos)
    edges = _edges(_steps(infos))
    sums = [_rows({path: s.sum(axis=-1) for path, s in info.scores.items()}) for info in infos]
    table = np.array([list(row.values()) for row in sums], float).T
    figure, curves, rows = _over_rows(len(table), title or "importance of every adapter over time")
    flat = lambda arrays: np.concatenate([np.ravel(array) for array in arrays.values()])
    live = [flat(info.scores)[flat(info.masks).astype(bool)] for info in infos]
    for name, function, style in (
        ("highest", np.max, {"color": "tab:blue", "lw": 1}),
        ("mean of the live", np.mean, {"color": "black", "lw": 1}),
        ("lowest of the live", np.min, {"color": "tab:orange", "lw": 2, "alpha": 0.8}),
    ):
        values = [_positive(function(scores)) if scores.size else np.nan for scores in live]
        _stairs(curves, values, edges, label=name, **style)
    curves.set_yscale("log")
    curves.set_ylabel("score of a triplet")
    curves.legend(fontsize=9, loc="lower right", frameon=False, ncols=3)
    top = table[np.isfinite(table)].max(initial=0) or 1.0
    colours = {"norm": LogNorm(max(top * 1e-6, table[table > 0].min(initial=top) / 2), top)}
    shares = table[:, -1] / (table[:, -1].sum() or 1)
    digits = 0 if len(table) < 30 else 1
    names = [f"{path}  {share:.{digits}%}" for path, share in zip(sums[0], shares)]
    image = _coloured(rows, edges, table, names, colours)
    rows.set_ylabel("adapter and its last share")
    figure.colorbar(image, ax=rows, label="sum of its scores", pad=0.02)
    return figure


def lifetimes(
    infos: Iterable[AllocatorInfo] | AllocatorInfo, *, title: str | None = None
) -> Figure:
    """Which triplets died when: one cell a triplet, coloured by the step of its last death.

    The cells of those that live in the end are white; a grey one is no triplet, where adapters
    started at different ranks. A star means that a triplet had died before and was revived.

    Args:
      infos: of the run, see the head of this module. A death between two of them counts for the
        later one.
      title: above the table.

    Raises:
      ValueError: ``infos`` is empty, has other things in it, or steps that do not rise.

    >>> lives = np.array([[1, 1, 1], [0, 1, 0], [1, 1, 0], [0, 1, 0]], bool)
    >>> infos = [AllocatorInfo(10 * i, 3, 3, {"up": mask}, {}) for i, mask in enumerate(lives)]
    >>> [cell.get_text() for cell in lifetimes(infos).axes[0].texts]
    ['30*', '', '10']
    """
    infos = _checked(infos)
    steps = _steps(infos)
    histories = {}  # {row: [infos, r]}
    for path in sorted(infos[0].masks, key=_natural):
        masks = np.array([np.asarray(info.masks[path], bool) for info in infos])
        for index in np.ndindex(masks.shape[1:-1]):
            histories[pytree.row_name(path, index)] = masks[(slice(None), *index)]
    width = max(alive.shape[-1] for alive in histories.values())
    died = np.full((len(histories), width), np.nan)
    labels = np.full(died.shape, "", object)
    for row, alive in enumerate(histories.values()):
        before = np.concatenate([np.ones_like(alive[:1]), alive[:-1]])
        deaths = before & ~alive
        for column in np.flatnonzero(~alive[-1]):
            died[row, column] = steps[np.flatnonzero(deaths[:, column])[-1]]
            star = "*" if deaths[:, column].sum() > 1 else ""
            labels[row, column] = f"{died[row, column]:.0f}{star}"

    height = min(0.5 + _ROW * len(histories), _TALLEST)
    figure = _figure(2.8 + 0.5 * width, height + 0.8)
    axes = figure.subplots()
    image = axes.imshow(died, cmap=_COLOURS, vmin=0, vmax=steps[-1] or 1, aspect="auto")
    if height < _TALLEST:
        for (row, column), label in np.ndenumerate(labels):
            dark = label and np.asarray(image.norm(died[row, column])) <= 0.6
            colour = "white" if dark else "black"
            axes.text(column, row, label, fontsize=8, ha="center", va="center", color=colour)
    for row, alive in enumerate(histories.values()):
        if missing := width - alive.shape[-1]:
            start = alive.shape[-1] - 0.5, row - 0.5
            axes.add_patch(Rectangle(start, missing, 1, facecolor="lightgray", lw=0))
    axes.set_yticks(np.arange(len(histories) - 1) + 0.5, minor=True)
    axes.set_xticks(np.arange(width - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="lightgray", lw=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(range(width))
    axes.tick_params(axis="x", labelsize=8)
    _label_rows(axes, [f"{row}  {alive[-1].sum()}" for row, alive in histories.items()], height)
    axes.set_xlabel("triplet")
    axes.set_ylabel("adapter and its last rank")
    axes.set_title(title or "when each triplet died (white: it lives)", fontsize=11)
    figure.colorbar(image, ax=axes, label="step", pad=0.02)
    return figure


def _checked(infos: Any) -> list[AllocatorInfo]:
    """A run's infos, one a step, in NumPy."""
    found, others = _infos(infos)
    if others or not found:
        raise ValueError(
            "infos must be what adalora_jax.info gave, one or more"
            + (f", not {type(others[0]).__name__}." if others else "; it is empty.")
        )
    if any(set(info.masks) != set(found[0].masks) for info in found):
        raise ValueError("infos name different adapters: pass those of one run.")
    if any(after <= before for before, after in itertools.pairwise(_steps(found))):
        raise ValueError("infos must be in the order of their steps, with no step twice.")
    return found


def _infos(history: Any) -> tuple[list[AllocatorInfo], list[Any]]:
    """The infos in ``history``, fetched from the device at once, and whatever else is in it."""
    if isinstance(history, AllocatorInfo):
        history = jax.device_get(history)
        count = np.size(history.step)
        stacked = history if np.ndim(history.step) else jax.tree.map(lambda x: x[None], history)
        history = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]
    history = list(history)
    found = jax.device_get([entry for entry in history if isinstance(entry, AllocatorInfo)])
    return found, [entry for entry in history if not isinstance(entry, AllocatorInfo)]


def _steps(infos: Sequence[AllocatorInfo]) -> list[int]:
    return [int(info.step) for info in infos]


def _ranks(ranks: Mapping[str, int] | AllocatorInfo) -> Mapping[str, int]:
    if not isinstance(ranks, AllocatorInfo):
        return ranks
    live = evaluation.ranks(ranks)
    return {path: live[path] for path in sorted(live, key=_natural)}


def _rows(values: Mapping[str, Any]) -> dict[str, Any]:
    """One number a matrix, the slices of a stack each on its own."""
    return {
        pytree.row_name(path, index): values[path][index]
        for path in sorted(values, key=_natural)
        for index in np.ndindex(np.shape(values[path]))
    }


def _natural(path: str) -> list[Any]:
    """Sorts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _positive(value: Any) -> Any:
    return value if value > 0 else np.nan


class _Figure(Figure):
    """A figure that a notebook shows although ``pyplot`` does not manage it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    return _Figure(figsize=(min(width, 16), height), dpi=100, layout="constrained")


def _over_rows(count: int, title: str) -> tuple[Figure, Any, Any]:
    """A figure with curves above one coloured row an adapter, over the same steps."""
    height = min(0.5 + _ROW * count, _TALLEST)
    figure = _figure(_WIDTH, height + 2.0)
    curves, rows = figure.subplots(2, 1, sharex=True, height_ratios=[1.3, height])
    curves.set_title(title, fontsize=11)
    rows.set_xlabel("step")
    return figure, curves, rows


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Where the steps begin, and the last one ends: what holds at one holds until the next."""
    return np.append(steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[-1] + 1)


def _stairs(axes: Any, values: Any, edges: np.ndarray, **style: Any) -> None:
    axes.stairs(values, edges, baseline=None, fill=False, **style)


def _coloured(
    axes: Any, edges: np.ndarray, table: np.ndarray, names: list[str], colours: dict[str, Any]
) -> Any:
    """One row of colours a name."""
    places = np.arange(len(names) + 1) - 0.5
    image = axes.pcolormesh(edges, places, table, cmap=_COLOURS, **colours)
    axes.invert_yaxis()
    _label_rows(axes, names, min(0.5 + _ROW * len(names), _TALLEST))
    return image


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
