"""The order of imports, the boundary of public and private, the packages an import loads, and
the names of the tests."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import types
from functools import cache
from pathlib import Path

import pytest

import adalora_jax as adalora

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adalora_jax"
FACADES = sorted({path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"})
# The other packages, and the third-party ones, that each implementation package may import.
BELOW = {
    "_compat": set(),
    "core": {"_compat"},
    "modules": {"core", "_compat"},
    "quantization": {"core", "modules", "_compat", "tensorfile"},
    "huggingface": {"core", "modules", "tensorfile"},
    "tensorfile": set(),
    "version": set(),
    "restack": {"core"},
    "checkpoint": {"core", "restack", "tensorfile", "version"},
    "plot": {"core"},
    "advice": {"core"},
}
OUTSIDE = {
    "_compat": {"jax"},
    "core": {"jax", "jaxtyping", "optax"},
    "modules": {"jax", "numpy", "optax", "flax"},
    "quantization": {"jax", "numpy", "flax", "qwix"},
    "huggingface": {"jax", "numpy", "huggingface_hub"},
    "tensorfile": {"ml_dtypes", "numpy", "safetensors"},
    "version": set(),
    "restack": {"jax"},
    "checkpoint": {"jax", "numpy", "orbax"},
    "plot": {"jax", "numpy", "matplotlib"},
    "advice": set(),
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(name):
    """Return the names of all modules a file imports at run time, also within functions."""
    tree = ast.parse(FILES[name].read_text())
    is_typing = lambda node: isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    typing = {id(inner) for node in ast.walk(tree) if is_typing(node) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in whole}
    return found


@cache
def depth(name):
    """Return the depth of a module: one more than the deepest module it imports."""
    below = {other for other in imports(name) if other in FILES} - {name, "adalora_jax"}
    return 1 + max(map(depth, below), default=0)


def test_import_depth_is_at_most_ten():
    assert max(map(depth, FILES)) <= 10


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("adalora_jax._src.")])
def test_module_imports_only_allowed_packages(name):
    package = name.split(".")[2]
    for other in imports(name):
        top, *rest = other.split(".")
        if top == "adalora_jax":
            if rest:
                assert rest[0] == "_src", f"{name} imports the public {other}"
                assert rest[1] in {package, *BELOW[package]}, f"{name} imports {other}"
            continue
        if top not in sys.stdlib_module_names:
            assert top in OUTSIDE[package], f"{name} imports {other}"


def private_parts(tree):
    """Return the uses of other packages' private parts: imports, attributes, dotted names, classes.

    A name is private if it begins with one underscore. Assignments to ``__class__`` count, too.
    """
    is_private = lambda names: any(n[:1] == "_" and n[:2] != "__" for n in names)
    foreign, found = set(), set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        module = getattr(node, "module", None) or ""
        for alias in node.names:
            if f"{module}.{alias.name}".lstrip(".").split(".")[0] != "adalora_jax":
                foreign.add(alias.asname or alias.name.split(".")[0])
                if is_private([*module.split("."), *alias.name.split(".")]):
                    found.add(ast.unparse(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            assigned = node.attr == "__class__" and isinstance(node.ctx, ast.Store)
            # os._exit is documented, in spite of its name.
            private = is_private(rest) and ast.unparse(node) != "os._exit"
            if assigned or (first in foreign and private):
                found.add(ast.unparse(node))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = node.value.split(".")
            if len(parts) > 1 and all(part.isidentifier() for part in parts) and is_private(parts):
                found.add(node.value)
    return found


@pytest.mark.parametrize("name", [name for name in FILES if name != "adalora_jax._src._compat"])
def test_private_parts_of_other_packages_are_used_in_compat_alone(name):
    assert not private_parts(ast.parse(FILES[name].read_text()))


@pytest.mark.parametrize(
    "code",
    [
        "from jax._src import core",
        "import qwix._src.model as m",
        "from flax.nnx import _x",
        "import jax; jax.tree._flatten(x)",
        "from flax import nnx as n; n.Module._setattr",
        "import sys; sys.modules.get('qwix._src.interception')",
        "module.__class__ = cls",
    ],
)
def test_private_parts_are_found(code):
    assert private_parts(ast.parse(code))
    assert not private_parts(
        ast.parse("import flax.nnx as n; n.x.__name__; from adalora_jax import _src")
    )


def test_uses_of_private_parts_and_of_old_versions_are_explained():
    thread = r"(https://github\.com/\S+/(issues|pull)/\d+|no issue was found; .)"
    private = rf"Needs upstream: .*\nUpstream: {thread}.*"
    old = r"Needed until: \w+ [\d.]+ is the oldest supported version\."
    form = rf"\nWhy: .*\n({private}|{old})\nChecked with: "
    for node in ast.parse(FILES["adalora_jax._src._compat"].read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert re.search(form, ast.get_docstring(node), re.DOTALL), node.name


@pytest.mark.parametrize("name", [name for name in FILES if "demo" in name])
def test_demo_imports_only_public_modules(name):
    assert not [other for other in imports(name) if "_src" in other]


@pytest.mark.parametrize("name", FACADES)
def test_facade_exports_exactly_its_imports(name):
    path = FILES[f"adalora_jax.{name}"]
    statements = ast.parse(path.read_text()).body
    kinds = {type(statement) for statement in statements[1:]}
    assert kinds == {ast.ImportFrom, ast.Assign}, "a docstring, imports and __all__"
    assert len(path.read_text().splitlines()) <= 60
    module = importlib.import_module(f"adalora_jax.{name}")
    public = {n for n, value in vars(module).items() if not n.startswith("_")}
    assert sorted(public) == sorted(module.__all__)


# Modules without a test file of their name, each with the reason.
UNTESTED = {
    "_compat": "the tests of its callers run every function of it",
    "version": "one string",
    "core/protocols": "types alone, which pyright checks",
}
MODULES = sorted(
    path.relative_to(PACKAGE / "_src").with_suffix("").as_posix()
    for path in (PACKAGE / "_src").rglob("*.py")
    if path.stem != "__init__"
)


@pytest.mark.parametrize("module", MODULES)
def test_module_has_a_test_file_of_its_name(module):
    """``merging.py`` is tested by ``test_merging.py``, or by ``test_merging_….py`` alone."""
    folder, _, name = module.rpartition("/")
    files = {path.stem for path in (ROOT / "tests" / folder).glob("test_*.py")}
    found = any(f"{file}_".startswith(f"test_{name}_") for file in files)
    assert found != (module in UNTESTED), "add a test file, or correct UNTESTED"


@pytest.mark.parametrize("package", ["core", "modules", "quantization", "huggingface"])
def test_test_files_are_named_after_modules(package):
    """``test_merging.py`` and ``test_merging_….py`` both test ``merging.py``."""
    modules = {path.stem for path in (PACKAGE / "_src" / package).glob("*.py")}
    for path in (ROOT / "tests" / package).rglob("test_*.py"):
        name = path.stem.removeprefix("test_")
        assert any(f"{name}_".startswith(f"{module}_") for module in modules), path


def test_import_does_not_load_optional_packages():
    optional = ["orbax", "qwix", "safetensors", "matplotlib", "sklearn", "tqdm", "torch"]
    optional += ["huggingface_hub"]
    code = (
        "import flax.linen, flax.nnx, optax, sys; before = set(sys.modules); import adalora_jax; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "adalora_jax" in loaded.stdout.split()
    assert not set(optional) & set(loaded.stdout.split())


def test_modules_with_optional_packages_are_imported_lazily():
    code = (
        "import sys, adalora_jax as adalora; assert 'orbax' not in sys.modules; "
        "print(adalora.checkpoint.__name__, adalora.huggingface.__name__); "
        "assert 'orbax' in sys.modules and 'quantization' in dir(adalora); adalora.budget_of"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["adalora_jax.checkpoint", "adalora_jax.huggingface"]
    assert "AttributeError: module 'adalora_jax' has no attribute 'budget_of'" in done.stderr


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("plot", "matplotlib", "plot"), ("quantization", "qwix", "quant")],
)
def test_lazy_import_without_its_package_names_the_extra(name, package, extra):
    code = f"import sys; sys.modules[{package!r}] = None; from adalora_jax import {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = f"`adalora_jax.{name}`: needs {package}, which is not installed; "
    assert f'{message}pip install "adalora-jax[{extra}]".' in done.stderr


def test_all_lists_exactly_the_public_names():
    public = {name for name in vars(adalora) if not name.startswith("_")}
    # Lazily imported modules are attributes once another test has used them.
    asked = {name for name in public if isinstance(getattr(adalora, name), types.ModuleType)}
    lazy = asked - {"functional", "linen", "nnx", "scores", "sharding"}
    assert set(adalora.__all__) == public - lazy
    assert sorted(adalora.__all__) == sorted(set(adalora.__all__))


def test_public_names_do_not_shadow_modules():
    for name in adalora.__all__:
        found = importlib.util.find_spec(f"adalora_jax.{name}")
        assert found is None or isinstance(getattr(adalora, name), types.ModuleType), name
