"""The notebooks: their code runs, and its output matches the stored output.

The cells run one after the other in this process, which takes a fraction of the time of one kernel
per notebook. Cells that need a third-party package have its name as a tag and run where it is
installed, in a separate environment.
"""

import ast
import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from support.compiling import environment

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Their time is mostly training, so they are slow tests.
SLOW = {
    "01-quick-start",
    "02-nnx",
    "03-what-it-decides",
    "04-resume-compact-export",
    "05-quantised-base",
    "09-inside-other-loops",
    "11-llm",
}
DEVICES = {"06-sharded-training": 8}  # run in a process with so many devices
PACKAGES = {
    "peft": pytest.mark.parity,
    "tunix": pytest.mark.trainers,
    "gemma": pytest.mark.trainers,
}
# Folders, addresses and names of a machine; dates and times of day.
PRIVATE = re.compile(
    r"/(tmp|home|root|work|usr|opt|mnt|Users)/|\b0x[0-9a-f]{6,}|localhost|"
    r"\b20\d\d-\d\d-\d\d\b|\b\d\d:\d\d:\d\d\b|site-packages"
)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def needs(cell):
    """Return the names of the packages that a cell needs."""
    return set(cell["metadata"].get("tags", []))


def shape_of(text):
    """Mask a text's numbers and lists, which a processor that rounds differently may change."""
    text = re.sub(r"\{.*?\}|\[.*?\]", "{}", text, flags=re.DOTALL)
    return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "0", re.sub(r"\s+", " ", text)).strip()


def shown(cell):
    """Return ``(printed text, whether there is a picture)`` of the stored outputs."""
    texts = ["".join(output["text"]) for output in cell["outputs"] if "text" in output]
    pictures = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
    return "".join(texts), bool(pictures)


def run(source, name, namespace):
    """Run a cell as a kernel does, and return the same as :func:`shown`."""
    body = ast.parse(source, name)
    value, printed = None, io.StringIO()
    last = ast.Expression(body.body.pop().value) if isinstance(body.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(body, name, "exec"), namespace)
        if last:
            value = eval(compile(last, name, "eval"), namespace)
    picture = value is not None and value._repr_png_().startswith(b"\x89PNG")
    return printed.getvalue(), picture


def check(path, packages=frozenset()):
    namespace = {"__name__": "__main__"}
    with jax.numpy_rank_promotion("allow"):  # as in a reader's session
        for number, cell in enumerate(code_cells(path), 1):
            if not needs(cell) <= packages:
                continue
            where = f"{path.name}, code cell {number}"
            (printed, picture), kept = run("".join(cell["source"]), where, namespace), shown(cell)
            assert shape_of(printed) == shape_of(kept[0]), f"{where} prints something else"
            assert picture == kept[1], f"{where}: a picture is missing or too many"
    return namespace


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run a notebook in a temporary folder, with temporary files there, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW))
        for path in NOTEBOOKS
        if not all(map(needs, code_cells(path))) and path.stem not in DEVICES
    ],
)
def test_notebook_output_matches_stored_output(path, elsewhere):
    check(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_notebook_runs_on_several_devices(name, tmp_path):
    code = f"import test_notebooks as t; t.check(t.FOLDER / {name + '.ipynb'!r})"
    env = environment(DEVICES[name])
    env["TMPDIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("path", "package"),
    [
        pytest.param(path, package, id=f"{path.stem}-{package}", marks=marker)
        for path in NOTEBOOKS
        for package, marker in PACKAGES.items()
        if any(package in needs(cell) for cell in code_cells(path))
    ],
)
@pytest.mark.filterwarnings("ignore")  # the packages' warnings, which a reader would see, too
def test_cells_tagged_with_package_run(path, package, elsewhere):
    if not importlib.util.find_spec(package):
        pytest.skip(f"needs {package}: pip install its extra of adalora-jax")
    check(path, {package})


def test_notebooks_are_numbered_and_use_every_package_tag():
    assert [int(path.stem[:2]) for path in NOTEBOOKS] == list(range(1, 12))
    tags = set().union(*(needs(cell) for path in NOTEBOOKS for cell in code_cells(path)))
    assert tags == set(PACKAGES)


@each_notebook
def test_stored_outputs_come_from_one_run_without_errors(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(o["output_type"], o.get("name")) for cell in cells for o in cell["outputs"]}
    assert kinds <= {("stream", "stdout"), ("execute_result", None)}
    assert any(cell["outputs"] for cell in cells)


@each_notebook
def test_notebook_contains_no_machine_specific_data(path):
    notebook = read(path)
    for cell in notebook["cells"]:
        text, _ = shown(cell) if cell["cell_type"] == "code" else ("", False)
        assert not PRIVATE.search(text + "".join(cell["source"])), text
        assert set(cell["metadata"]) <= {"tags"}, "no times of execution"
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@each_notebook
def test_notebook_is_small_and_opens_with_its_result(path):
    assert path.stat().st_size < 500_000
    title, _, opening = "".join(read(path)["cells"][0]["source"]).partition("\n\n")
    assert re.fullmatch(rf"# {int(path.stem[:2])}\. .+", title)
    assert opening.startswith("At the end ")


@each_notebook
def test_notebook_links_resolve(path):
    text = "".join("".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] != "code")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert [link for link in links if not (FOLDER / link).exists()] == []
