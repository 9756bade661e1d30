"""Tables as text."""

from adalora_jax._src.core.text import table


def test_columns_are_aligned_to_the_widest_cell():
    rows = [("layer", "kind", "rank"), ("head", "dense", 12), ("encoder/up", "", 3)]
    assert table(rows, left=2).splitlines() == [
        "layer        kind    rank",
        "head         dense     12",
        "encoder/up              3",
    ]


def test_lines_have_no_trailing_spaces():
    assert table([("a", ""), ("bcd", "")], left=2) == "a\nbcd"
