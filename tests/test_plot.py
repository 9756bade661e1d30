"""The pictures: what they show, what they refuse, and that they leave pyplot alone."""

import subprocess
import sys

import matplotlib.figure
import numpy as np
import pytest

from adalora_jax import plot

RANKS = {
    f"encoder/blocks_{layer}/{module}": rank
    for layer, pair in enumerate([(4, 0), (3, 1), (2, 2)])
    for module, rank in zip(("attention/query", "up"), pair)
}


def texts(labels):
    return [label.get_text() for label in labels]


def test_heat_map_has_a_cell_for_every_adapter():
    axes = plot.rank_heatmap(RANKS, highest=8).axes[0]
    assert texts(axes.get_xticklabels()) == ["attention/query", "up"]
    assert texts(axes.get_yticklabels()) == ["0", "1", "2"]
    assert texts(axes.texts) == ["4", "0", "3", "1", "2", "2"]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[4, 0], [3, 1], [2, 2]])
    assert axes.images[0].get_clim() == (0, 8)


def test_heat_map_leaves_out_what_is_not_there():
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
def test_heat_map_reads_every_form_of_path(ranks, rows, columns):
    axes = plot.rank_heatmap(ranks).axes[0]
    assert texts(axes.get_yticklabels()) == rows
    assert sorted(texts(axes.get_xticklabels())) == columns


def test_history_shows_every_step_and_the_budget():
    history = [{"query": 4, "up": 4}, {"query": 2, "up": 4}, {"up": 3, "query": 1}]
    figure = plot.rank_history(history, steps=[0, 10, 30], budget=[8, 6, 4], highest=6)
    curves, rows = figure.axes[:2]
    np.testing.assert_array_equal(rows.collections[0].get_array(), [[4, 2, 1], [4, 4, 3]])
    assert rows.collections[0].get_clim() == (0, 6)
    drawn = {patch.get_label(): patch.get_data() for patch in curves.patches}
    np.testing.assert_array_equal(drawn["budget"].values, [8, 6, 4])
    np.testing.assert_array_equal(drawn["live triplets"].values, [8, 6, 4])
    np.testing.assert_array_equal(drawn["budget"].edges, [0, 10, 30, 50])


def test_history_of_one_step_and_without_budget():
    figure = plot.rank_history([{"query": 0}])
    assert [patch.get_label() for patch in figure.axes[0].patches] == ["live triplets"]


def test_a_large_model_stays_within_a_screenful():
    ranks = {f"layers/{i}/{m}": i % 9 for i in range(80) for m in ("query", "value", "up")}
    for figure in (plot.rank_heatmap(ranks), plot.rank_history([ranks, ranks])):
        width, height = figure.get_size_inches()
        assert width <= 16
        assert height <= 17


def test_notebooks_get_a_picture():
    figure = plot.rank_heatmap(RANKS)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.rank_heatmap({}), "ranks={} is empty"),
        (lambda: plot.rank_history([]), "history is empty"),
        (lambda: plot.rank_history([{}]), "history is empty"),
        (lambda: plot.rank_history([{"a": 1}, {"b": 1}]), r"history\[1\].*'a', 'b'"),
        (lambda: plot.rank_history([{"a": 1}], steps=[1, 2]), "steps has 2 entries for the 1"),
        (lambda: plot.rank_history([{"a": 1}], budget=[]), "budget has 0 entries for the 1"),
        (lambda: plot.rank_history([{"a": 1}] * 2, steps=[3, 3]), "steps must rise"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_pyplot_is_not_involved():
    code = "import sys, adalora_jax.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
