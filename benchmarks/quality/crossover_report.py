"""Page and figure of ``crossover``, made from its results."""

from __future__ import annotations

from typing import Any


def text(results: Any) -> str:
    return ""


def picture(results: Any) -> Any:
    from matplotlib.figure import Figure

    return Figure()
