"""Figures: their contents, their errors, and independence of pyplot."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest

from adalora_jax import plot
from adalora_jax._src.core.monitor import AllocatorInfo

RANKS = {
    f"encoder/blocks_{layer}/{module}": rank
    for layer, pair in enumerate([(4, 0), (3, 1), (2, 2)])
    for module, rank in zip(("attention/query", "up"), pair)
}


def texts(labels):
    return [label.get_text() for label in labels]


def test_heat_map_has_cell_for_every_adapter():
    axes = plot.rank_heatmap(RANKS, highest=8).axes[0]
    assert texts(axes.get_xticklabels()) == ["attention/query", "up"]
    assert texts(axes.get_yticklabels()) == ["0", "1", "2"]
    assert texts(axes.texts) == ["4", "0", "3", "1", "2", "2"]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[4, 0], [3, 1], [2, 2]])
    assert axes.images[0].get_clim() == (-0.5, 8.5)
    assert axes.images[0].cmap.N == 9  # one colour per rank


def test_heat_map_masks_missing_adapters():
    axes = plot.rank_heatmap({"blocks/0/up": 1, "blocks/1/down": 2}).axes[0]
    assert axes.images[0].get_array().mask.tolist() == [[False, True], [True, False]]
    assert texts(axes.texts) == ["1", "2"]


def test_heat_map_sorts_layers_by_number():
    axes = plot.rank_heatmap({f"layers/{i}/up": 1 for i in (10, 9, 0)}).axes[0]
    assert texts(axes.get_yticklabels()) == ["0", "9", "10"]


@pytest.mark.parametrize(
    ("ranks", "rows", "columns"),
    [
        ({"layers/up[0]": 1, "layers/up[1]": 2}, ["0", "1"], ["layers/up"]),
        ({"experts/up[0,1]": 1, "experts/up[1,0]": 2}, ["0,1", "1,0"], ["experts/up"]),
        ({"encoder/0/up": 1, "decoder/0/up": 2}, ["decoder/0", "encoder/0"], ["up"]),
        ({"Dense_0": 1, "Dense_1": 2}, ["0", "1"], ["·"]),
        ({"query": 1, "value": 0}, [""], ["query", "value"]),
        ({"": 3}, [""], [""]),
    ],
)
def test_heat_map_parses_every_form_of_path(ranks, rows, columns):
    axes = plot.rank_heatmap(ranks).axes[0]
    assert texts(axes.get_yticklabels()) == rows
    assert sorted(texts(axes.get_xticklabels())) == columns


def test_history_shows_every_step_and_budget():
    history = [{"query": 4, "up": 4}, {"query": 2, "up": 4}, {"up": 3, "query": 1}]
    figure = plot.rank_history(history, steps=[0, 10, 30], budget=[8, 6, 4], highest=6)
    curves, rows = figure.axes[:2]
    np.testing.assert_array_equal(rows.collections[0].get_array(), [[4, 2, 1], [4, 4, 3]])
    assert rows.collections[0].get_clim() == (-0.5, 6.5)
    assert rows.collections[0].cmap.N == 7  # one colour per rank
    drawn = {patch.get_label(): patch.get_data() for patch in curves.patches}
    np.testing.assert_array_equal(drawn["budget"].values, [8, 6, 4])
    np.testing.assert_array_equal(drawn["active triplets"].values, [8, 6, 4])
    np.testing.assert_array_equal(drawn["budget"].edges, [0, 10, 30, 50])


def final_ranks(rows):
    return [int(text) for text in texts(rows.child_axes[0].get_yticklabels())]


def test_history_separates_adjacent_layers():
    rows = plot.rank_history([RANKS, dict(reversed(RANKS.items()))]).axes[1]
    assert texts(rows.get_yticklabels()) == ["attention/query", "up"] * 3
    assert final_ranks(rows) == [4, 0, 3, 1, 2, 2]
    centres = {text.get_text(): text.xy[1] for text in rows.texts}
    layers = {f"blocks {layer}": 2 * layer + 0.5 for layer in range(3)}
    assert centres.items() >= layers.items()
    assert [line.get_ydata()[0] for line in rows.lines] == [1.5, 3.5]


def test_history_keeps_order_of_dicts_and_paths_of_scattered_layers():
    ranks = {f"blocks_{layer}/{module}": layer for module in ("up", "down") for layer in (1, 0)}
    rows = plot.rank_history([ranks]).axes[1]
    assert texts(rows.get_yticklabels()) == list(ranks)
    assert not rows.lines


def test_history_of_many_layers_labels_some_layers():
    ranks = {f"layers/{i}/{module}": i % 9 for i in range(200) for module in ("query", "up")}
    rows = plot.rank_history([ranks]).axes[1]
    assert texts(rows.get_yticklabels()) == []
    assert 20 < len(rows.texts) < 200


def test_history_accepts_one_step_without_budget():
    figure = plot.rank_history([{"query": 0}])
    assert [patch.get_label() for patch in figure.axes[0].patches] == ["active triplets"]


def test_rank_figures_of_large_model_have_bounded_size():
    ranks = {f"layers/{i}/{m}": i % 9 for i in range(80) for m in ("query", "value", "up")}
    for figure in (plot.rank_heatmap(ranks), plot.rank_history([ranks, ranks])):
        width, height = figure.get_size_inches()
        assert width <= 16
        assert height <= 17


def test_figures_render_in_notebooks():
    figure = plot.rank_heatmap(RANKS)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")


LIVES = {
    "layers/9": [(1, 1, 1), (1, 0, 1), (1, 1, 0), (1, 0, 0)],
    "layers/10": [(1, 1), (1, 1), (0, 1), (0, 1)],
    "stack": [((1, 1), (1, 1)), ((0, 1), (1, 1)), ((0, 1), (1, 1)), ((0, 1), (0, 0))],
}


def infos(steps=(1, 11, 21, 41)):
    """Return four infos of three adapters of different ranks, one of them a stack of two."""
    result = []
    for i, step in enumerate(steps):
        masks = {path: jnp.array(lives[i], bool) for path, lives in LIVES.items()}
        scores = {path: (2.0 + mask) / (i + 1) for path, mask in masks.items()}
        active = sum(int(mask.sum()) for mask in masks.values())
        scalars = map(jnp.int32, (step, active + 1, active))
        result.append(AllocatorInfo(*scalars, masks, scores))
    return result


def stairs(axes):
    return {patch.get_label(): patch.get_data() for patch in axes.patches}


def test_history_of_infos_uses_their_steps_and_budgets():
    figure = plot.rank_history(infos())
    curves, rows = figure.axes[:2]
    drawn = stairs(curves)
    np.testing.assert_array_equal(drawn["active triplets"].values, [9, 7, 6, 3])
    np.testing.assert_array_equal(drawn["budget"].values, [10, 8, 7, 4])
    np.testing.assert_array_equal(drawn["budget"].edges, [1, 11, 21, 41, 61])
    assert texts(rows.get_yticklabels()) == ["layers/9", "layers/10", "stack[0]", "stack[1]"]
    assert final_ranks(rows) == [1, 1, 1, 0]
    assert rows.collections[0].get_array()[:, 1].tolist() == [2, 2, 1, 2]
    assert texts(plot.rank_heatmap(infos()[-1]).axes[0].texts) == ["1", "0", "1", "1"]


def test_rank_curves_show_spread_of_ranks():
    totals, spread = plot.rank_curves(infos()).axes
    np.testing.assert_array_equal(stairs(totals)["active triplets"].values, [9, 7, 6, 3])
    np.testing.assert_array_equal(stairs(totals)["budget"].values, [10, 8, 7, 4])
    drawn = stairs(spread)  # of the ranks 3 2 2 2, 2 2 1 2, 2 1 1 2, 1 1 1 0
    np.testing.assert_array_equal(drawn["mean"].values, [2.25, 1.75, 1.5, 0.75])
    np.testing.assert_array_equal(drawn["lowest to highest"].baseline, [2, 1, 1, 0])
    np.testing.assert_array_equal(drawn["lowest to highest"].values, [3, 2, 2, 1])
    np.testing.assert_array_equal(drawn["interquartile range"].baseline, [2, 1.75, 1, 0.75])
    np.testing.assert_array_equal(drawn["interquartile range"].values, [2.25, 2, 2, 1])


def test_importance_is_sum_of_adapter_scores():
    curves, rows, _ = plot.importance_history(infos()).axes
    last = [7 / 4, 5 / 4, 5 / 4, 4 / 4]
    table = rows.collections[0].get_array()
    np.testing.assert_allclose(table[:, 0], [9, 6, 6, 6])
    np.testing.assert_allclose(table[:, -1], last)
    shares = [label.split()[-1] for label in texts(rows.get_yticklabels())]
    assert shares == [f"{value / sum(last):.0%}" for value in last]
    drawn = stairs(curves)
    np.testing.assert_allclose(drawn["lowest of active"].values, [3, 1.5, 1, 0.75])
    np.testing.assert_allclose(drawn["highest"].values, [3, 1.5, 1, 0.75])
    assert curves.get_yscale() == "log"


def test_importance_of_zero_scores_or_empty_masks_is_drawn():
    none = [info._replace(scores=jax.tree.map(jnp.zeros_like, info.scores)) for info in infos()]
    dead = [info._replace(masks=jax.tree.map(jnp.zeros_like, info.masks)) for info in infos()]
    for history in (none, dead):
        assert plot.importance_history(history)._repr_png_().startswith(b"\x89PNG")


def test_lifetimes_show_pruning_steps_and_mark_revived_triplets():
    axes = plot.lifetimes(infos()).axes[0]
    table = axes.images[0].get_array().filled(0)
    expected = [[0, 41, 21], [21, 0, 0], [11, 0, 0], [41, 41, 0]]
    np.testing.assert_array_equal(table, expected)
    shown = np.reshape(texts(axes.texts), (4, 3)).tolist()
    assert shown == [["", "41*", "21"], ["21", "", ""], ["11", "", ""], ["41", "41", ""]]
    grey = [patch.get_bbox().bounds for patch in axes.patches]  # cells without a triplet
    assert grey == [(1.5, row - 0.5, 1, 1) for row in (1, 2, 3)]


@pytest.mark.parametrize(
    "draw", [plot.rank_history, plot.rank_curves, plot.importance_history, plot.lifetimes]
)
def test_single_and_stacked_infos_are_accepted(draw):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos())
    assert draw(stacked)._repr_png_() == draw(infos())._repr_png_()
    assert draw(infos()[0])._repr_png_() == draw(infos()[:1])._repr_png_()


def test_run_figures_of_large_model_have_bounded_size():
    masks = {f"layers/{m}": jnp.ones((80, 12), bool) for m in ("query", "value", "up")}
    scores = jax.tree.map(lambda mask: mask * 1.0, masks)
    history = [AllocatorInfo(i, 2880, 2880, masks, scores) for i in range(3)]
    for draw in (plot.rank_curves, plot.importance_history, plot.lifetimes):
        width, height = draw(history).get_size_inches()
        assert width <= 16
        assert height <= 17


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.rank_curves([]), "`infos`: is empty; pass one or more results"),
        (lambda: plot.lifetimes([{"a": 1}]), "`infos`: contains a dict; pass one or more results"),
        (lambda: plot.importance_history(infos((1, 2, 2, 3))), "`infos`: the steps must increase"),
        (
            lambda: plot.lifetimes([infos()[0], infos()[1]._replace(masks={})]),
            "`infos`: the entries name different adapters",
        ),
        (lambda: plot.rank_heatmap({}), "`ranks={}`: is empty"),
        (lambda: plot.rank_heatmap({"a": 1}, highest=0), "`highest=0`: must be at least 1"),
        (
            lambda: plot.rank_heatmap(jax.tree.map(lambda *leaves: jnp.stack(leaves), *infos())),
            r"info with \(4,\) steps",
        ),
        (lambda: plot.rank_history([]), "`history`: is empty"),
        (lambda: plot.rank_history([{}]), "`history`: is empty"),
        (lambda: plot.rank_history([{"a": 1}, {"b": 1}]), r"history\[1\].*'a', 'b'"),
        (lambda: plot.rank_history([{"a": 1}], steps=[1, 2]), "`steps`: has 2 entries for the 1"),
        (lambda: plot.rank_history([{"a": 1}], budget=[]), "`budget`: has 0 entries for the 1"),
        (
            lambda: plot.rank_history([{"a": 1}] * 2, steps=[3, 3]),
            "`steps`: the steps must increase",
        ),
        (lambda: plot.rank_history(infos((1, 2, 2, 3))), "`history`: the steps must increase"),
        (lambda: plot.rank_history(infos(), steps=[1, 2, 3, 4]), "`steps`: is given with infos"),
        (lambda: plot.rank_history(infos(), budget=[9, 7, 6, 3]), "`budget`: is given with infos"),
        (lambda: plot.rank_history([*infos(), {"a": 1}]), "both infos and other entries"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pyplot_is_not_imported():
    code = "import sys, adalora_jax.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
