"""The site in ``docs/``: the Python code of its pages runs."""

import re
from pathlib import Path

import jax
import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.relative_to(DOCS).parts[0] not in {"notebooks", "benchmarks"}
    and "```python\n" in page.read_text(encoding="utf-8")
]


def run_blocks(page, namespace):
    """Run the Python blocks of a page in order, each at its line of the file."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        source = "\n" * text.count("\n", 0, match.start(1)) + match[1]
        exec(compile(source, page, "exec"), namespace)


@pytest.fixture(scope="module")
def example():
    """Return the names that ``docs/example.md`` defines."""
    namespace = {"__name__": "docs"}
    with jax.numpy_rank_promotion("allow"):  # as in a reader's session
        run_blocks(DOCS / "example.md", namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(DOCS).with_suffix(""))
)
def test_python_blocks_run_in_order(page, example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):
        run_blocks(page, dict(example))
