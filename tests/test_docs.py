"""The site in ``docs/``: its Python code runs, and its reference is complete and correct."""

import ast
import dataclasses
import importlib
import inspect
import re
import types
from pathlib import Path

import jax
import pytest

import adalora_jax as adalora

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
    "page", PAGES, ids=lambda page: page.relative_to(DOCS).with_suffix("").as_posix()
)
def test_python_blocks_run_in_order(page, example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):
        run_blocks(page, dict(example))


API = DOCS / "reference" / "api"
FACADES = sorted(path.stem for path in API.glob("*.md") if path.stem != "index")


def test_every_public_module_has_a_page():
    folder = Path(adalora.__file__).parent
    modules = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert set(FACADES) == modules | {"adalora_jax"}


@pytest.mark.parametrize("name", FACADES)
def test_page_documents_every_public_name_of_its_module(name):
    if name in ("qwix_models", "quantization"):
        pytest.importorskip("qwix")
    if name == "plot":
        pytest.importorskip("matplotlib")
    module = adalora if name == "adalora_jax" else importlib.import_module(f"adalora_jax.{name}")
    text = (API / f"{name}.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. (?:auto|py:)(?:class|function|data):: (\w+)$", text, re.M)
    is_module = lambda name: isinstance(getattr(module, name), types.ModuleType)
    assert sorted(documented) == [name for name in module.__all__ if not is_module(name)]


def rows(text):
    """Return ``{first cell: other cells}`` of the tables in a text, whose first cells are code."""
    lines = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M)
    assert len(dict(lines)) == len(lines)
    return {name: [cell.strip() for cell in cells.split(" |")] for name, cells in lines}


def defaults(table):
    return {
        name: ... if cells[0] == "required" else ast.literal_eval(cells[0].strip("`"))
        for name, cells in table.items()
    }


def test_config_page_has_all_fields_with_their_defaults():
    text = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    config, _, rank_spec = text.partition("## RankSpec")
    config, table = adalora.AdaLoraConfig, rows(config)
    parameters = inspect.signature(config).parameters.values()
    expected = {p.name: ... if p.default is p.empty else p.default for p in parameters}
    assert defaults(table) == expected
    fields = {field.name for field in dataclasses.fields(config)}
    marked = {name for name in fields if table[name][1] == "✓"}
    assert marked == fields & set(config(total_step=1).to_peft())
    expected = {field.name: field.default for field in dataclasses.fields(adalora.RankSpec)}
    assert defaults(rows(rank_spec)) == expected


def strings_of_package():
    """Return the strings in the package's code, with a NUL in place of each formatted value."""
    found = set()
    for path in Path(adalora.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            text = [getattr(part, "value", None) for part in parts]
            found.add("".join(part if isinstance(part, str) else "\0" for part in text))
    return found


def test_messages_on_error_page_are_in_the_source():
    text = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    messages = re.findall(r"^(?:`` |`)(.*?)(?: ``|`)\n: ", text, re.M)
    assert len(messages) > 20
    strings = strings_of_package()
    for message in messages:
        # The name of an argument at the start may be a formatted value, or not be in the string.
        choices = (message, re.sub(r"^`?[a-z_]+(=|`?: )", "", message))
        pieces = [[p for p in re.split(r"<.*?>", text) if len(p) > 2] for text in choices]
        patterns = [".*".join(map(re.escape, part)) for part in pieces if part]
        found = [p for p in patterns if any(re.search(p, s, re.DOTALL) for s in strings)]
        assert found, message
