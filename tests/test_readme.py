"""The README: its Python code runs, and ``.ci/run`` runs its command lines."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """Yield the fenced blocks of a language, each padded to its line in the file."""
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE):
        yield "\n" * README.count("\n", 0, match.start(1)) + match[1]


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for source in blocks("python"):
        exec(compile(source, ROOT / "README.md", "exec"), names)
    active = [jnp.count_nonzero(adapter.lam) for adapter in names["final"].values()]
    assert sum(active) == names["config"].target_r * len(names["adapters"])
    merged = names["model"].apply(names["merged"], names["x"])
    adapted = names["adapted"].apply(names["variables"], names["final"], names["x"])
    assert jnp.allclose(merged, adapted, atol=1e-4)
    assert jnp.array_equal(names["nnx_final"](names["x"]), names["base"](names["x"]))


@pytest.mark.parametrize("extra", ["demo", "test"])
def test_install_command_of_each_extra_occurs_once(extra):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert sum(line.startswith(f'pip install ".[{extra}]" && ') for line in lines) == 1


def test_relative_links_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
