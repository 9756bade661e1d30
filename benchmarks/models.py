"""Public models, unmodified: adapted, trained, pruned to the budget and merged.

    python -m benchmarks.models [--family tunix flax] [--path CHECKOUT ...] [--out FOLDER]

Builds tiny configurations of models that other projects publish, of those packages that are
installed, and adapts every layer. bonsai and Flax's examples are read from checkouts, whose folders
``--path`` adds to the import path. The rows of a run replace those of the same families in the
stored results, so packages that exclude each other can be checked in separate environments. Takes
half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import meta
from flax.traverse_util import flatten_dict

import adalora_jax as adalora
from benchmarks import public_linen, public_models, public_nnx, public_transformers, results

FAMILIES = {
    "huggingface": public_transformers.cases,
    "tunix": public_nnx.tunix,
    "gemma": public_linen.gemma,
    "bonsai": public_nnx.bonsai,
    "flax": lambda: public_linen.flax() | public_nnx.flax(),
}
STEPS = 8
CONFIG = adalora.AdaLoraConfig(
    total_step=STEPS, init_r=2, target_r=1, tinit=1, tfinal=2, scale=1.0, target_modules=".*"
)
# Relative errors of float32 outputs. Merging changes the order of sums, so its error is relative to
# the change of the outputs, which is larger than that of a mere rounding error.
SAME, MERGED = 1e-6, 1e-2


def arrays(outputs: Any) -> list[jax.Array]:
    """Return the floating-point arrays of a model's outputs, with masked entries set to 0."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if hasattr(leaf, "dtype")]
    leaves = [jnp.asarray(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return [jnp.where(jnp.isfinite(x) & (abs(x) < 1e9), x, 0).astype(jnp.float32) for x in leaves]


def norm(xs: list[jax.Array]) -> float:
    return float(np.sqrt(sum(float(jnp.vdot(x, x)) for x in xs)))


def difference(xs: list[jax.Array], ys: list[jax.Array]) -> float:
    """Return the norm of the difference between two lists of arrays."""
    return norm([x - y for x, y in zip(xs, ys, strict=True)])


def loss_of(outputs: list[jax.Array]) -> jax.Array:
    """Return the mean squared distance of each output from random numbers, summed."""
    keys = jax.random.split(jax.random.key(7), len(outputs))
    targets = [jax.random.normal(key, x.shape) for key, x in zip(keys, outputs)]
    return sum((jnp.mean((x - t) ** 2) for x, t in zip(outputs, targets)), jnp.zeros(()))


class Linen:
    """A linen model while it is checked."""

    def __init__(self, case: public_models.Case) -> None:
        self.case = case
        self.adapted = adapted = adalora.linen.adapt(case.model, CONFIG, layers=case.layers)
        self.adapters = adapted.init(jax.random.key(1), case.variables, *case.args, **case.kwargs)
        self.plain = jax.jit(lambda v: arrays(case.model.apply(v, *case.args, **case.kwargs)))
        self.run = jax.jit(lambda v, a: arrays(adapted.apply(v, a, *case.args, **case.kwargs)))
        self.base = case.variables
        self.before = jax.tree.map(np.array, self.base)

    def description(self) -> str:
        return self.adapted.describe(self.base, *self.case.args, **self.case.kwargs)

    def outputs(self) -> list[jax.Array]:
        return self.run(self.base, self.adapters)

    def train(self) -> tuple[list[float], dict[str, int]]:
        """Return the losses, and the ranks at the end."""
        tx = adalora.adalora(optax.adamw(1e-2), CONFIG)

        @jax.jit
        def step(variables: Any, adapters: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
            def loss(adapters: Any) -> jax.Array:
                outputs = self.run(variables, adapters)
                return loss_of(outputs) + adalora.orthogonality(adapters, CONFIG)

            value, grads = jax.value_and_grad(loss)(adapters)
            updates, opt_state = tx.update(grads, opt_state, adapters)
            return optax.apply_updates(adapters, updates), opt_state, value

        opt_state, losses = tx.init(self.adapters), []
        for _ in range(STEPS):
            self.adapters, opt_state, value = step(self.base, self.adapters, opt_state)
            losses.append(float(value))
        self.adapters, opt_state = adalora.finish(opt_state, self.adapters)
        self.adapters = adalora.eval_params(opt_state, self.adapters)
        return losses, adalora.ranks(opt_state)

    def frozen(self) -> bool:
        return all(jax.tree.leaves(jax.tree.map(np.array_equal, self.before, self.base)))

    def merged(self) -> Any:
        return adalora.merge(self.base, self.adapters)

    def weights(self, variables: Any) -> dict[str, Any]:
        return flatten_dict(meta.unbox(variables["params"]), sep="/")

    def set(self, adapters: dict[str, Any]) -> None:
        self.adapters = adapters


class Nnx:
    """An NNX model while it is checked."""

    def __init__(self, case: public_models.Case) -> None:
        self.case = case
        self.base = case.model
        self.before = jax.tree.map(np.array, self.weights(self.base))
        self.model = adalora.nnx.adapt(self.base, CONFIG, nnx.Rngs(1), layers=case.layers)
        self.jitted = nnx.jit(self.call)

    def call(self, model: Any) -> list[jax.Array]:
        return arrays(self.case.call(model, *self.case.args, **self.case.kwargs))

    @property
    def adapters(self) -> dict[str, Any]:
        return adalora.nnx.adapters(self.model)

    def description(self) -> str:
        return adalora.nnx.describe(self.base, CONFIG, layers=self.case.layers)

    def plain(self, model: Any) -> list[jax.Array]:
        return self.jitted(nnx.clone(model))

    def outputs(self) -> list[jax.Array]:
        return self.plain(self.model)

    def train(self) -> tuple[list[float], dict[str, int]]:
        """Return the losses, and the ranks at the end."""
        tx = adalora.adalora(optax.adamw(1e-2), CONFIG)
        optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model: Any, optimizer: Any) -> jax.Array:
            def loss(model: Any) -> jax.Array:
                penalty = adalora.orthogonality(nnx.state(model, nnx.LoRAParam), CONFIG)
                return loss_of(self.call(model)) + penalty

            chosen = nnx.DiffState(0, nnx.LoRAParam)
            value, grads = nnx.value_and_grad(loss, argnums=chosen)(model)
            optimizer.update(model, grads)
            return value

        losses = [float(step(self.model, optimizer)) for _ in range(STEPS)]
        model, optimizer = adalora.finish(optimizer, self.model)
        self.model = adalora.nnx.eval_model(model, optimizer)
        return losses, adalora.ranks(adalora.allocator_state(optimizer.opt_state))

    def frozen(self) -> bool:
        now = self.weights(self.model)
        return all(np.array_equal(value, now[path]) for path, value in self.before.items())

    def merged(self) -> Any:
        try:
            return adalora.merge(self.model)
        except ValueError:  # some uses of weights are known only from outputs
            return adalora.merge(self.model, inputs=self.call)

    def weights(self, model: Any) -> dict[str, Any]:
        params = nnx.to_flat_state(nnx.state(model, nnx.Param))
        return {"/".join(map(str, path)): variable[...] for path, variable in params}

    def set(self, adapters: dict[str, Any]) -> None:
        self.model = adalora.nnx.with_adapters(self.model, adapters)


def without(adapters: dict[str, Any], message: str) -> dict[str, Any]:
    """Return the adapters without the one that an error message names."""
    named = [path for path in adapters if f"{path!r}" in message]
    return {path: a for path, a in adapters.items() if path not in named[:1]}


def moved(adapters: dict[str, Any]) -> dict[str, Any]:
    """Return adapters with random singular values."""
    rng = np.random.default_rng(3)

    def with_lam(adapter: adalora.Adapter) -> adalora.Adapter:
        return adapter._replace(lam=jnp.asarray(rng.normal(size=adapter.lam.shape), jnp.float32))

    return {path: with_lam(adapter) for path, adapter in adapters.items()}


def merge(model: Linen | Nnx, row: dict[str, Any]) -> Any:
    """Return the merged variables or model.

    Layers that cannot be merged are recorded in the row, and lose their adapters.
    """
    while True:
        try:
            return model.merged()
        except ValueError as error:
            rest = without(model.adapters, str(error))
            if len(rest) == len(model.adapters):
                raise
            row["refused"] = sorted({*row["refused"], first_line(error)})
            model.set(rest)


def unnamed(
    before: dict[str, Any],
    after: dict[str, Any],
    left_out: dict[str, list[str]],
    refused: list[str],
) -> list[str]:
    """Return the matrices that merging does not change and that ``describe`` and ``merge`` omit.

    >>> before = {"up/kernel": np.ones((2, 2)), "h_0/mix": np.ones((2, 2)), "v": np.ones((2, 2))}
    >>> after = before | {"up/kernel": np.zeros((2, 2))}
    >>> unnamed(before, after, {"in no layer of a known kind": ["h_*/mix (2, 2) x 2"]}, [])
    ['v']
    """
    named = {parameter.partition(" ")[0] for listed in left_out.values() for parameter in listed}
    named |= {path for message in refused for path in re.findall(r"'(\S+)'", message)}
    return [
        path
        for path, value in before.items()
        # As in `describe`, since those of stacked layers have two axes.
        if value.ndim >= 2 and path.rpartition("/")[2] not in ("bias", "scale")
        if np.array_equal(value, after[path])
        if named.isdisjoint((path, path.rpartition("/")[0], re.sub(r"\d+", "*", path)))
    ]


def left_out(description: str) -> dict[str, list[str]]:
    """Return ``{reason: parameters}`` of what no adapter covers, from the text of ``describe``.

    >>> left_out("not adapted: head (4, 3): it is tied")
    {'it is tied': ['head (4, 3)']}
    >>> left_out("in no layer of a known kind: mix (2, 2), h/*/v (2, 2) x 9. To adapt one, declare")
    {'in no layer of a known kind': ['mix (2, 2)', 'h/*/v (2, 2) x 9']}
    """
    found: dict[str, list[str]] = {}
    for line in description.splitlines():
        kind, _, rest = line.partition(": ")
        if kind == "not adapted":
            parameter, _, reason = rest.partition(": ")
            found.setdefault(reason, []).append(parameter.removesuffix(" ()"))
        elif kind == "in no layer of a known kind":
            listed = re.findall(r"\S+ \([\d, ]+\)(?: x \d+)?", rest.partition(". To adapt")[0])
            found[kind] = listed
    return found


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def check(build: Callable[[], public_models.Case]) -> dict[str, Any]:
    """Return the row of a model: what was found, and under ``error`` the exception, if any."""
    row: dict[str, Any] = {"error": "", "refused": [], "left out": {}}
    try:
        case = build()
    except Exception as error:  # another project's code may raise anything
        return {**row, "error": f"the model itself: {type(error).__name__}: {first_line(error)}"}
    with jax.set_mesh(case.mesh) if case.mesh else contextlib.nullcontext():
        examine(case, row)
    return row


def examine(case: public_models.Case, row: dict[str, Any]) -> None:
    """Add to the row what is found for a model."""
    try:
        model = (Nnx if isinstance(case.model, nnx.Module) else Linen)(case)
        row["adapters"] = len(model.adapters)
        row["left out"] = left_out(model.description())
        base = model.plain(model.base)
        row["identity"] = difference(model.outputs(), base) / norm(base)
        wanted = sum(a.lam[..., 0].size for a in model.adapters.values()) * CONFIG.target_r
        row["losses"], ranks = model.train()
        row["budget"] = [sum(ranks.values()), wanted]
        row["active"] = sum(int((a.lam != 0).sum()) for a in model.adapters.values())
        row["frozen"] = model.frozen()
        row["merge"] = []
        for change in (dict, moved):
            model.set(change(model.adapters))
            merged = merge(model, row)
            outputs = model.outputs()
            error = difference(outputs, model.plain(merged))
            row["merge"].append(float(np.float64(error) / difference(outputs, base)))
        weights = model.weights(model.base), model.weights(merged)
        row["unnamed"] = unnamed(*weights, row["left out"], row["refused"])
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {first_line(error)}"


def faults(row: dict[str, Any]) -> list[str]:
    """Return what is wrong in a row; empty if the model is right in every respect."""
    if row["error"]:
        return [row["error"]]
    found = []
    if not row["identity"] <= SAME:
        found.append("the adapted model differs from its base at the start")
    if not (np.isfinite(row["losses"]).all() and row["losses"][-1] < row["losses"][0]):
        found.append("the loss does not fall")
    if row["budget"][0] != row["budget"][1] or row["active"] > row["budget"][1]:
        found.append("the run does not end within its budget")
    if not row["frozen"]:
        found.append("the base changed")
    if not all(error < MERGED for error in row["merge"]):
        found.append("the merged model differs from the adapted one")
    if row["unnamed"]:
        found.append(f"`describe` does not name {', '.join(row['unnamed'])}")
    return found


def text(found: results.Results) -> str:
    rows = found["rows"]
    right = sum(not faults(row) for row in rows)
    refused = sum(bool(row["refused"]) for row in rows)
    parts = [
        "# Public models",
        "Models that other projects publish, at tiny sizes, are adapted as they are: every layer "
        f'(`target_modules=".*"`), trained for {STEPS} steps with AdamW, pruned and merged. '
        f"{right} of {len(rows)} are right in every respect: the adapted model equals its base at "
        "the start, the loss falls, the run ends with exactly its budget, the base is unchanged "
        "bit by bit, and the merged model computes what the adapted one does, after training and "
        f"with random singular values. In {refused} of them, `merge` refuses layers by name, and "
        "they are merged without. The error of merging is that of the outputs, relative to their "
        "distance from the base's.",
        "Weights that merging does not change must be among the parameters that `describe` names; "
        "they are listed below each table. Numbers in paths are replaced by `*` where several "
        "parameters have one shape. Those in no layer of a known kind are adapted once the class "
        "of their module is declared: `adapt(..., layers={Class: Layout(...)})`.",
    ]
    for family, title in public_models.TITLES.items():
        mine = [row for row in rows if row["family"] == family]
        if not mine:
            parts += [f"## {title}", "Not measured."]
            continue
        parts += [f"## {title}", f"Checked with {mine[0]['package']}.{NOTES.get(family, '')}"]
        parts += [results.markdown([HEADER, *map(cells, mine)])]
        parts += [note for row in mine if (note := notes_of(row))]
        parts += reasons_of(mine)
    return "\n\n".join([*parts, results.ending("models", found)])


NOTES = {
    "huggingface": " Their code calls `jnp.clip` with the argument names of older versions of JAX, "
    "which are translated.",
}
HEADER = ("model", "adapters", "at the start", "loss", "triplets", "base", "error of merging")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of a model in the table."""
    if row["error"]:
        return (row["model"], "", "", "", "", "", "see below")
    losses = [results.number(loss) for loss in (row["losses"][0], row["losses"][-1])]
    return (
        row["model"],
        str(row["adapters"]),
        "equal" if row["identity"] <= SAME else f"off by {row['identity']:.0e}",
        " → ".join(losses),
        f"{row['budget'][0]} of {row['budget'][1]}",
        "unchanged" if row["frozen"] else "changed",
        f"{max(row['merge']):.0e}",
    )


def notes_of(row: dict[str, Any]) -> str:
    """Return a paragraph with a model's faults and refusals; empty if there are none."""
    notes = [note.rstrip(".") for note in (*faults(row), *row["refused"])]
    return f"{row['model']}: {'. '.join(notes)}." if notes else ""


def reasons_of(rows: list[dict[str, Any]]) -> list[str]:
    """Return a table per reason of the parameters that no adapter covers."""
    by_reason: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        for reason, parameters in row["left out"].items():
            shown = ", ".join(f"`{parameter}`" for parameter in parameters)
            by_reason.setdefault(reason, []).append((row["model"], shown))
    parts = []
    for reason, listed in by_reason.items():
        escaped = reason.replace("_", r"\_")
        parts += [f"Without an adapter: {escaped}."]
        parts += [results.markdown([("model", "parameters"), *listed])]
    return parts


def merged_rows(path: pathlib.Path, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the new rows, and those of other families in a file, if it exists."""
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    families = {row["family"] for row in new}
    rows = [row for row in rows if row["family"] not in families] + new
    return sorted(rows, key=lambda row: list(public_models.TITLES).index(row["family"]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    titles = list(public_models.TITLES)
    parser.add_argument("--family", nargs="+", choices=titles, default=titles)
    parser.add_argument("--path", nargs="+", default=[], help="checkouts of bonsai or Flax")
    parser.add_argument("--out", type=pathlib.Path, help="folder for the results")
    chosen = parser.parse_args(arguments)
    sys.path += chosen.path
    warnings.simplefilter("ignore")  # those of the other projects
    rows, missing = [], []
    for family in chosen.family:
        if (package := public_models.package(family)) is None:
            missing.append(f"{family} is not installed: {public_models.INSTALL[family]}")
            continue
        for name, build in FAMILIES[family]().items():
            row = {"family": family, "package": package, "model": name, **check(build)}
            print(f"{family} {name}: {'; '.join(faults(row)) or 'right'}", file=sys.stderr)
            rows.append(row)
            jax.clear_caches()
    print("\n".join(missing), file=sys.stderr)
    path = (chosen.out or results.HERE) / "models.json"
    if rows:
        results.finish("models", {"rows": merged_rows(path, rows)}, text, folder=chosen.out)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # so that products are in float32
    main()
