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
    namespace = {"__name__": "readme"}
    sources = list(blocks("python"))
    assert len(sources) >= 4
    for source in sources:
        exec(compile(source, ROOT / "README.md", "exec"), namespace)
    for name in ("adapters", "nnx_adapters"):
        live = [jnp.count_nonzero(a.lam) for a in namespace[name].values()]
        assert sum(live) == namespace["config"].target_r * 4


@pytest.mark.parametrize("extra", ["demo", "test"])
def test_install_command_of_each_extra_occurs_once(extra):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert sum(line.startswith(f'pip install ".[{extra}]" && ') for line in lines) == 1


def test_every_difference_from_peft_links_to_a_test():
    links = re.findall(r"\[test\]\((tests/parity/\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 10
    for file, line in links:
        source = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert source[int(line) - 1].startswith("def test_"), f"{file}#L{line}"


def test_relative_links_exist():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
