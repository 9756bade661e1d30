"""The benchmarks: equivalence of peers, tables, pages, imports, and every script."""

import ast
import graphlib
import importlib
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    __main__,
    allocator,
    backends,
    compiled,
    memory,
    models,
    networks,
    peers,
    public_models,
    results,
    scaling,
    training,
)

SMALL = {"depth": 1, "width": 16, "hidden": 32, "heads": 2, "batch": 2, "vocabulary": 20}
SHAPES = {
    "bert": networks.Shape("bert", **SMALL, length=6),
    "vit": networks.Shape("vit", **SMALL, image=8, patch=4),
    "gpt": networks.Shape("gpt", **SMALL, length=6, scan=True),
    "llama": networks.Shape("llama", **SMALL, length=6),
}


def losses(name, shape, dropout=0.0, steps=3):
    step = peers.build(name, shape, rank=3, dropout=dropout)
    return [float(step()) for _ in range(steps)]


def test_ours_and_autodiff_have_equal_losses():
    ours, by_hand = (losses(name, SHAPES["bert"]) for name in ("lora", "autodiff"))
    np.testing.assert_allclose(ours, by_hand, rtol=1e-5)
    assert ours[2] < ours[1] < ours[0]  # it trains
    training.compare({"lora": ours, "autodiff": by_hand, "frozen": [9, 9, 9]}, "float32", 0.0)
    with pytest.raises(RuntimeError, match="should have the same losses"):
        training.compare({"lora": ours, "autodiff": [1.001 * v for v in by_hand]}, "float32", 0.0)


def test_frozen_baseline_has_base_loss_and_computes_gradient():
    step = peers.build("frozen", SHAPES["gpt"])
    probe = step.state[0]
    assert probe.shape == (2, 6, 16)
    assert not probe.any()
    model = networks.Linen(SHAPES["gpt"])
    inputs, labels = networks.data(SHAPES["gpt"])
    logits = model.apply({"params": peers.base(SHAPES["gpt"])}, inputs)
    np.testing.assert_allclose(step(), networks.cross_entropy(logits, labels), rtol=1e-5)
    assert step.state[0].any()  # so its gradient was computed


@pytest.mark.parametrize("kind", SHAPES)
def test_linen_and_nnx_models_have_equal_outputs(kind):
    shape = SHAPES[kind]
    inputs, _ = networks.data(shape)
    linen = jax.jit(networks.Linen(shape).apply)({"params": peers.base(shape)}, inputs)
    np.testing.assert_allclose(peers.nnx_base(shape)(inputs), linen, atol=1e-5)


@pytest.mark.parametrize("kind", SHAPES)
def test_all_linear_layers_are_adapted(kind):
    found = peers.abstract("adalora", SHAPES[kind])[1][1]
    matrices = {"bert": 6, "vit": 6, "gpt": 4, "llama": 7}
    assert len(found) == matrices[kind]
    stack = (1,) if kind == "gpt" else ()  # the GPT's layers are stacked
    assert all(adapter.lam.shape == (*stack, peers.RANK) for adapter in found.values())


def test_ratios_are_medians_over_rounds():
    times = {"adalora": [2.0, 4.0, 30.0], "lora": [1.0, 4.0, 30.0], "frozen": [1.0, 2.0, 10.0]}
    result = {"milliseconds": times, "missing": {}}
    assert "| adalora_jax: AdaLoRA | 4.00 | 2.00 | 1.00 |" in training.table(result)
    found = training.findings([result, {"milliseconds": {"adalora": [3.0], "frozen": [4.0]}}])
    assert "- 0.75 to 2.00 times as long as the frozen model" in found
    assert "- 1.00 to 1.00 times as long as LoRA" in found


def test_allocator_benchmark_covers_each_kind_of_step():
    case = allocator.Case("small", ((5, 4, 3, 3), (4, 5, 6, 1)))
    ours = allocator.Ours(case)
    assert ours.bytes == 4 * 12 * (3 * (5 + 4 + 1) + 6 * (4 + 5 + 1))
    active = {}
    for moment, step in allocator.MOMENTS.items():
        active[moment] = sum(int(mask.sum()) for mask in ours.at(step)().values())
    # The budget falls over the run, and ends at 8 of 12 triplets in each of the 9 matrices.
    assert (
        active["averages"]
        == 9 * 12
        > active["averages and mask"]
        >= active["after the final mask"]
        == 9 * 8
    )
    times = {"ours": [4.0], "floor": [1.0], "peft": [12.0]}
    result = {"case": "small", "adapters": 9, "milliseconds": {"averages": times}}
    row = "| small | 9 | averages | 4.00 | 1.00 | 12.0 | 4.00 | 3.00 |"
    assert allocator.table([result]).endswith(row)


def test_unsupported_peer_is_listed_in_table():
    with pytest.raises(networks.Unsupported, match="has no dropout"):
        peers.build("flax-lora", SHAPES["bert"], dropout=0.1)
    result = {"milliseconds": {"frozen": [1.0], "adalora": [2.0]}, "missing": {"qwix": "why"}}
    table = training.table(result).splitlines()
    assert table[2] == "| frozen model | 1.00 | 1.00 | 0.50 |"
    assert table[4] == "| Qwix: LoRA | not measured: why |  |  |"


def test_memory_is_computed_from_shapes():
    found = {name: memory.of_jax(name, SHAPES["bert"], 0.0) for name in ("lora", "svd", "adalora")}
    adapters = found["adalora"]["adapters"]
    triplets = 6 * peers.RANK
    assert found["lora"]["adapters"] == adapters - 4 * triplets
    # AdamW's count; then its and the allocator's averages, the masks, a step and a budget
    assert found["svd"]["training state"] == 3 * adapters + 4
    scalars = 4 * 4 + 1  # step, budget, overridden, penalty; applied
    assert found["adalora"]["training state"] == 5 * adapters + 4 + triplets + scalars
    assert memory.extra(found, "adalora", "svd", "training state") == pytest.approx(2.0, abs=0.1)
    assert "| adalora_jax: AdaLoRA | " in memory.table(found, {"qwix": "not installed"})


def test_scaling_reports_its_cases():
    shape, rank = scaling.at("adapters per layer", 2, SHAPES["bert"])
    assert (shape.adapted, rank) == (("query", "value"), peers.RANK)
    assert scaling.at("rank", 4, shape) == (shape, 4)


PROGRAM = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], /*index=1*/f32[8]{0}) parameter(0)
  %fusion.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
  ROOT %tuple = (s32[], f32[8]{0}) tuple(%p, %fusion.1)
}

%some (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %copy.3 = f32[8]{0} copy(%q)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(8,128)S(1)} parameter(0)
  %copy.1 = f32[8]{0} copy(%a), sharding={replicated}
  %copy-start = (f32[8]{0:T(128)S(1)}, f32[8]{0}, u32[]) copy-start(%a)
  %copy-done = f32[8]{0} copy-done(%copy-start)
  %all-reduce-start = f32[8]{0} all-reduce-start(%copy.1), to_apply=%sum
  %all-reduce-done = f32[8]{0} all-reduce-done(%all-reduce-start)
  %while = (s32[], f32[8]{0}) while(%a), condition=%body, body=%body
  ROOT %cond = f32[8]{0} conditional(%a, %a), branch_computations={%some, %some}
}
"""


def test_operations_of_program_are_counted():
    assert backends.counts(PROGRAM, 7) == backends.Counts(
        kernels=3,  # the loop's body and condition, and the sum over devices
        copies=1,
        branch_kernels=2,
        conditionals=1,
        collectives=1,
        temporaries=7,
    )


def test_update_is_compiled_for_any_device_and_new_rows_replace_old_ones(tmp_path):
    rows = [
        {"device": "cpu", "case": "update-36", "peer": peer, "kernels": kernels}
        for peer, kernels in (("adalora", 2), ("adamw", 1), ("adamw", 3))
    ]
    file = tmp_path / "compiled.json"
    file.write_text(json.dumps({"results": rows[:2]}))
    assert compiled.merged(file, rows[2:]) == [rows[2], rows[0]]
    found = compiled.measure(compiled.Case("small", ("adalora",), 6), "adalora", "cpu")
    assert found["kernels"] > 0
    assert found["conditionals"] == 2  # on a CPU, the averages have one, too


class Tied(nn.Module):
    """An embedding that is also the head, by hand, and a matrix of the module itself."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 6, name="embed")
        x = nn.Dense(6, name="proj")(embed(ids))
        x = x @ self.param("mix", nn.initializers.normal(1.0), (6, 6))
        return x @ embed.embedding.T


def test_public_model_is_checked_and_parameters_without_adapter_are_named():
    ids, model = np.array([[1, 2, 3]]), Tied()
    case = public_models.Case(model, model.init(jax.random.key(0), ids), (ids,), {})
    row = models.check(lambda: case)
    assert models.faults(row) == []
    assert (row["adapters"], row["budget"]) == (1, [1, 1])
    (tied, embed), (unknown, mix) = row["left out"].items()
    assert tied.startswith("its weight is also used outside of the layer")
    assert (embed, unknown, mix) == (
        ["embed (11, 6)"],
        "in no layer of a known kind",
        ["mix (6, 6)"],
    )
    row |= {"family": "flax", "package": "ours", "model": "tied"}
    page = models.text({"rows": [row], "machine": results.machine()})
    assert "1 of 1 are right" in page
    assert "| tied | `mix (6, 6)` |" in page


def test_public_nnx_model_is_checked_without_layers_that_cannot_be_merged():
    class Plus(nnx.Module):
        def __init__(self):
            self.up = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.squared = nnx.Linear(4, 4, dot_general=square, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.squared(self.up(x))

    def square(x, kernel, *args, **kwargs):
        return jax.lax.dot_general(x, kernel * kernel, *args, **kwargs)

    x = np.linspace(-1, 1, 12, dtype="f4").reshape(3, 4)
    row = models.check(lambda: public_models.Case(Plus(), None, (x,), {}))
    assert models.faults(row) == []
    assert row["adapters"] == 2
    (refused,) = row["refused"]
    assert refused.startswith("`variables`: the increment of 'squared' cannot be merged")


def test_faults_of_public_models_are_found():
    right = {
        "error": "",
        "identity": 0.0,
        "losses": [2.0, 1.0],
        "budget": [3, 3],
        "active": 2,
        "frozen": True,
        "merge": [1e-6, 1e-6],
        "unnamed": [],
    }
    assert models.faults(right) == []
    wrong = {
        "error": "ValueError: no",
        "identity": 1e-3,
        "losses": [2.0, float("nan")],
        "budget": [4, 3],
        "active": 4,
        "frozen": False,
        "merge": [1e-6, float("nan")],
        "unnamed": ["mix"],
    }
    assert all(len(models.faults({**right, name: value})) == 1 for name, value in wrong.items())

    def build():
        raise TypeError("clip() got an unexpected keyword argument")

    assert models.faults(models.check(build)) == [
        "the model itself: TypeError: clip() got an unexpected keyword argument"
    ]


def test_new_rows_of_public_models_replace_old_ones_and_missing_packages_are_named(
    tmp_path, capsys
):
    row = {"family": "flax", "model": "a", "error": "the model itself: no"}
    old = [{**row, "package": "old"}, {**row, "family": "tunix", "package": "kept"}]
    path = tmp_path / "models.json"
    path.write_text(json.dumps({"rows": old}))
    found = models.merged_rows(path, [{**row, "package": "new"}])
    assert [(r["family"], r["package"]) for r in found] == [("tunix", "kept"), ("flax", "new")]
    missing = [name for name in public_models.TITLES if public_models.package(name) is None]
    path.write_text(json.dumps({"rows": []}))
    if missing:
        models.main(["--family", *missing, "--out", str(tmp_path)])
        assert f"{missing[0]} is not installed" in capsys.readouterr().err


def test_benchmarks_command_lists_all_scripts():
    command = [sys.executable, "-m", "benchmarks"]
    options = {"capture_output": True, "text": True, "cwd": ROOT}
    told = subprocess.run([*command, "--help"], check=True, **options).stdout
    for name in ("compiled", "memory", "merging", "planning", "quantized", "scaling"):
        assert name in told
    for name in ("networks", "peers", "timing", "results", "__main__"):  # modules without a command
        assert name not in told
    wrong = subprocess.run([*command, "speed"], check=False, **options)
    assert "no benchmark is called speed" in wrong.stderr


@pytest.mark.parametrize("name", __main__.names())
def test_page_is_rendered_from_stored_results(name):
    module = importlib.import_module(f"benchmarks.{name}")
    path = ROOT / f"benchmarks/{name}.json"
    page = results.page(path, module.text, getattr(module, "picture", None))
    assert page == path.with_suffix(".md").read_text("utf-8"), "run python -m benchmarks --render"


def test_numbers_are_plain():
    numbers = (0, 1698.6, 0.48321, 9.996, 0.000253, 3.385e3)
    assert list(map(results.number, numbers)) == [
        "0",
        "1,700",
        "0.483",
        "10.0",
        "0.000253",
        "3,380",
    ]
    assert [results.factor(ratio) for ratio in (0.451, 9.994, 27.69)] == ["0.45", "9.99", "27.7"]


def test_imports_of_benchmarks_are_acyclic():
    arrows, dotted = {}, lambda name: name.startswith("benchmarks.")
    for path in (ROOT / "benchmarks").rglob("*.py"):
        found = arrows[".".join(path.relative_to(ROOT).with_suffix("").parts)] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):  # also within functions
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None)
                names = [f"{module}.{a.name}" if module else a.name for a in node.names]
                found |= set(filter(dotted, [*names, module or ""]))
    order = list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError
    assert order.index("benchmarks.peers") < order.index("benchmarks.training")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (
            "training",
            "--model bert gpt --depth 1 --rounds 1 --dropout 0 "
            "--peers frozen lora adalora autodiff flax-lora qwix-nnx peft-adalora",
        ),
        ("allocator", "--case bert --rounds 1"),
        ("memory", "--model bert --depth 1"),
        ("scaling", "--width 32 --rounds 1 --axis rank"),
        ("breakdown", "--model bert --depth 1 --rounds 1"),
    ],
)
def test_benchmark_script_runs(script, arguments, tmp_path):
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", *arguments.split(), "--out", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},  # small models
        check=True,
    )
    stored = json.loads((tmp_path / f"{script}.json").read_text())
    assert stored["machine"]["jax"] == jax.__version__
    row = "| BERT-small | 36 |" if script == "allocator" else "adalora_jax: AdaLoRA"
    assert row in (tmp_path / f"{script}.md").read_text()
    assert (tmp_path / f"{script}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", SHAPES)
def test_transformers_model_has_our_parameter_count_and_trains(kind):
    pytest.importorskip("torch", reason="needs torch: pip install '.[parity]'")
    from benchmarks import torch_peers

    shape = SHAPES[kind]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    theirs = sum(parameter.numel() for parameter in torch_peers.model(shape).parameters())
    types = 2 * shape.width if kind == "bert" else 0  # BERT's token types
    assert theirs == count(peers.base(shape)) + types
    step = peers.build("peft-adalora", shape, rank=3, dropout=0.1)
    assert sum(p.numel() for p in step.trainable) == count(peers.first(shape, 3))
    values = [float(step()) for _ in range(3)]
    assert values[2] < values[0]
