"""The house: which room may import which, and what an import of the package pulls in."""

import ast
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

import adalora_jax as adalora

PACKAGE = Path(__file__).parent.parent / "adalora_jax"

# From the ground floor up: a room imports only rooms named before it.
ROOMS = [
    "protocols",
    "checks",
    "rankspec",
    "config_peft",
    "config",
    "layout",
    "lowrank",
    "adapter",
    "tree",
    "regularizer",
    "schedule",
    "scores",
    "ranking",
    "allocator",
    "evaluation",
    "transform",
    "diagnostics",
    "layers",
    "sharding",
    "compaction",
    "bank",
    "targets",
    "usage",
    "linen_layers",
    "linen",
    "nnx_layers",
    "nnx",
    "merging",
    "serialization",
    "inits",
    "tensorfile",
    "checkpoint",
    "packed",
    "qwix_models",
    "gptq",
    "quantization",
    "huggingface",
    "plot",
    "demo",
    "__main__",
]
# The one room that may import each outside package; jax, numpy and chex are everybody's.
OUTSIDE = {
    "flax": {
        "linen_layers",
        "linen",
        "nnx_layers",
        "nnx",
        "merging",
        "serialization",
        "inits",
        "packed",
        "qwix_models",
        "gptq",
        "quantization",
        "demo",
    },
    "optax": {
        "tree",
        "allocator",
        "evaluation",
        "transform",
        "sharding",
        "compaction",
        "merging",
        "demo",
    },
    "orbax": {"checkpoint"},
    "qwix": {"qwix_models", "quantization"},
    "safetensors": {"gptq"},
    "matplotlib": {"plot"},
    "sklearn": {"demo"},
    "tqdm": {"demo", "__main__"},
}


def files():
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The names of all modules that a file imports when it runs, ``adalora_jax.tree`` as such."""
    tree = ast.parse(path.read_text())
    is_typing = lambda node: isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    typing = {id(inner) for node in ast.walk(tree) if is_typing(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(path):
    room = room_of(path)
    if room == "__init__":
        return  # the front door opens onto all rooms
    assert room in ROOMS, f"{room} is a new room: give it its floor in ROOMS"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "adalora_jax" and len(parts) > 1 and parts[1] in {*ROOMS} - {room}:
            assert ROOMS.index(parts[1]) < ROOMS.index(room), f"{room} imports {parts[1]} above it"
        if parts[0] in OUTSIDE:
            assert room in OUTSIDE[parts[0]], f"{parts[0]} belongs to {OUTSIDE[parts[0]]}"


def test_importing_the_package_leaves_the_optional_packages_alone():
    optional = ["orbax", "qwix", "safetensors", "matplotlib", "sklearn", "tqdm", "torch"]
    code = (
        "import flax.linen, flax.nnx, optax, sys; before = set(sys.modules); import adalora_jax; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "adalora_jax" in loaded.stdout.split()
    assert not set(optional) & set(loaded.stdout.split())


def test_rooms_with_further_packages_are_there_when_asked_for():
    code = (
        "import sys, adalora_jax as adalora; assert 'orbax' not in sys.modules; "
        "print(adalora.checkpoint.save.__module__, adalora.huggingface.save_pretrained.__module__)"
        "; "
        "assert 'orbax' in sys.modules and 'quantization' in dir(adalora); adalora.budget_of"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["adalora_jax.checkpoint", "adalora_jax.huggingface.adapters"]
    assert "AttributeError: module 'adalora_jax' has no attribute 'budget_of'" in done.stderr


def test_all_lists_exactly_the_public_names():
    import adalora_jax

    rooms = set(ROOMS) - {"linen", "nnx", "scores", "sharding"}
    public = {name for name in vars(adalora_jax) if not name.startswith("_")}
    modules = {name for name in public if isinstance(vars(adalora_jax)[name], type(sys))}
    assert set(adalora_jax.__all__) == public - (modules & rooms)
    assert sorted(adalora_jax.__all__) == sorted(set(adalora_jax.__all__))


def test_no_public_name_is_that_of_a_module_it_is_not():
    for name in adalora.__all__:
        found = importlib.util.find_spec(f"adalora_jax.{name}")
        assert found is None or isinstance(getattr(adalora, name), types.ModuleType), name
