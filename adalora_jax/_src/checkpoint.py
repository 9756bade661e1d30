"""Saving and restoring the whole training state in one orbax checkpoint."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import tree_util
from jax.tree_util import KeyPath
from jax.typing import ArrayLike

from adalora_jax._src import restack
from adalora_jax._src.core import checks, pytree
from adalora_jax._src.core.adapter import Adapter, check_adapter
from adalora_jax._src.core.allocator import (
    AllocatorState,
    allocator_state,
    is_allocator_state,
)
from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.core.evaluation import check_masks
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree, leaf_name
from adalora_jax._src.core.roles import group_by_role, stack
from adalora_jax._src.core.stacking import restack as restack_roles
from adalora_jax._src.core.stacking import unstack
from adalora_jax._src.core.text import shorten
from adalora_jax._src.tensorfile import folder_path, writing_to
from adalora_jax._src.version import __version__

if TYPE_CHECKING:
    import optax

_FORMAT = "adalora_jax/2"
_Spec: TypeAlias = tuple[tuple[int, ...], str]  # shape and dtype
# Fields that the optimizer and its adapters depend on; layer selection may be written differently.
_OF_THE_RUN = (
    *("total_step", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2"),
    *("lora_alpha", "scale"),
)
_OTHER = "restore another checkpoint"  # what to do when one is damaged
_PARTS = ("adapters", "opt_state")
_BY_ROLE = ("masks", "sensitivity", "uncertainty")  # fields of the allocator's state
_MOST_COMPRESSED = 40_000  # maximum compression ratio of zstd, reached by zeros


class Checkpoint(NamedTuple):
    """The content of a checkpoint, as :func:`restore` returns it.

    Attributes:
      adapters: the trained parameters, with the saved shapes and dtypes: ``{path: Adapter}`` and
        the parameters of ``modules_to_save``, or the containers of ``target``.
      opt_state: the optimizer's state.
      allocator: the allocator's state, as in ``opt_state``; with arrays in place of NNX Variables.
      step: the trainer's step that was passed to ``save``, or else the number of updates.
      config: the run's config.
      version: the version of the library that saved the checkpoint.
    """

    adapters: PyTree
    opt_state: PyTree
    allocator: AllocatorState
    step: int
    config: AdaLoraConfig
    version: str


def save(
    path: str | os.PathLike[str],
    adapters: PyTree,
    opt_state: PyTree,
    config: AdaLoraConfig,
    *,
    step: int | None = None,
) -> None:
    """Write adapters, optimizer and allocator state, step, config and version to a new folder.

    The write is atomic: the folder exists only once it is complete, even if the process is killed.
    To keep several checkpoints or to save asynchronously, use
    ``orbax.checkpoint.CheckpointManager`` with :func:`save_args`.

    Args:
      path: the folder to write; it must not exist.
      adapters: the trained parameters: the dict that ``adapted.init`` returned, or an NNX State.
        The base model is not saved.
      opt_state: a state that contains one :class:`~adalora_jax.AllocatorState`: an optax state, or
        the ``opt_state`` of an ``nnx.Optimizer``.
      config: the run's config. Only the name of a function in it is saved.
      step: the trainer's step, if it differs from the number of optimizer updates.

    Raises:
      TypeError: ``config`` is not an :class:`~adalora_jax.AdaLoraConfig`.
      ValueError: ``path`` exists, ``opt_state`` does not contain exactly one allocator or belongs
        to another config or other adapters, ``step`` is not an integer of at least 0, or two leaves
        have the same path.
      OSError: ``path`` cannot be written.

    >>> import jax, optax, tempfile, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/first", adapters, tx.init(adapters), config)
    ...     restored = restore(f"{folder}/first", tx)
    >>> bool((restored.adapters["query"].p == adapters["query"].p).all()), restored.step
    (True, 0)
    """
    folder = _folder(path)
    if folder.exists():
        raise ValueError(
            f"`path={str(path)!r}`: exists; save under a new name, or use a CheckpointManager, "
            "which makes one folder per step."
        )
    args = save_args(adapters, opt_state, config, step=step)
    with (
        writing_to("path", path),
        ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
        checkpointer.save(folder, args=args)


def save_args(
    adapters: PyTree, opt_state: PyTree, config: AdaLoraConfig, *, step: int | None = None
) -> ocp.args.Composite:
    """Return the ``args`` of ``CheckpointManager.save``, for the same content as :func:`save`.

    Args:
      adapters, opt_state, config, step: as in :func:`save`.

    Returns:
      The orbax arguments for one checkpoint; :func:`restore` reads the folder of its step.

    Raises:
      TypeError: ``config`` is not an :class:`~adalora_jax.AdaLoraConfig`.
      ValueError: ``opt_state`` does not contain exactly one allocator or belongs to another config
        or other adapters, ``step`` is not an integer of at least 0, two leaves have the same path,
        or an adapter has rank 0.

    >>> import jax, optax, tempfile, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> opt_state = adalora.adalora(optax.adam(1e-3), config).init(adapters)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ocp.CheckpointManager(folder) as manager:
    ...         _ = manager.save(3, args=save_args(adapters, opt_state, config, step=3))
    ...     restore(f"{folder}/3").step
    3
    """
    adapters, opt_state = unstack((adapters, opt_state))  # so that either form restores it
    allocator = allocator_state(opt_state)
    check_config(config)
    _check_config(opt_state, config, "config")
    found = pytree.adapters(adapters)
    # Also by name, since an NNX State may have random numbers of dropout beside p, lam and q.
    lams = {
        name.removesuffix("lam").rstrip("/"): leaf
        for name, leaf in _flatten_named(adapters).items()
        if f"/{name}".endswith("/lam")
    }
    check_masks(lams | {path: a.lam for path, a in found.items()}, allocator.masks)
    if step is not None:
        step = checks.integer("step", step, minimum=0)
    if empty := [path for path, a in found.items() if not a.lam.size]:
        raise ValueError(
            f"`adapters`: {', '.join(map(repr, empty[:5]))} has rank 0, and orbax stores no array "
            "without values; leave it out with compact(adapters, opt_state, tx), or exclude its "
            "layer."
        )
    leaves = _state(adapters, _map_allocators(_by_path, opt_state))
    keys = {name: str(jax.random.key_impl(x)) for name, x in leaves.items() if _is_key(x)}
    arrays = {name: _data(leaf) for name, leaf in leaves.items()}
    prints = jax.device_get(_fingerprints(arrays))
    about = {
        "format": _FORMAT,
        "version": __version__,
        "step": int(allocator.step) if step is None else step,
        "config": config.to_dict(),
        "arrays": {name: [*_spec(leaf), int(prints[name])] for name, leaf in leaves.items()},
        "keys": keys,
        "allocator": _allocator_name(opt_state),
        "facts": _facts_of(adapters),
        "nested": _nested_paths(adapters),
    }
    about["digest"] = _digest(about)
    return ocp.args.Composite(
        state=ocp.args.StandardSave(arrays),  # pyright: ignore[reportCallIssue]
        adalora=ocp.args.JsonSave(about),  # pyright: ignore[reportCallIssue]
    )


def restore(
    path: str | os.PathLike[str],
    tx: optax.GradientTransformation | None = None,
    *,
    target: tuple[PyTree, PyTree] | None = None,
    config: AdaLoraConfig | None = None,
    stacks: Mapping[str, Sequence[str]] | None = None,
) -> Checkpoint:
    """Restore the content of a checkpoint bit for bit.

    Args:
      path: a folder that :func:`save` wrote, or the folder of a step of a ``CheckpointManager``.
      tx: the optimizer, as returned by ``adalora(...)`` or an optax chain around it.
      target: ``(adapters, opt_state)`` with the saved structure, shapes and dtypes, of arrays or
        ``jax.ShapeDtypeStruct``. The arrays are restored with the shardings of ``target``, which
        may be on another mesh.
      config: the config to continue with; it must equal the saved one. It is required, together
        with ``tx`` or ``target``, if the saved config contains functions.
      stacks: restores into a model that is scanned where the saved one was unrolled, or the other
        way round. ``{path in the scanned form: paths in the unrolled form}``, in the order of the
        first axis of the stack, such as ``{"layers": ["layer_0", "layer_1"]}``. A path is that of a
        module or of an adapter, and includes everything below it. The checkpoint is converted to
        the form that it does not have; ``target`` has that form. None (default): both forms are the
        same.

    Returns:
      A :class:`Checkpoint`. With ``target`` it has the containers of ``target``. With ``tx`` alone,
      ``adapters`` is ``{path: Adapter}`` and the parameters of ``modules_to_save``, nested in dicts
      as they were saved, and ``opt_state`` has the structure of ``tx.init(adapters)``. With
      neither, ``adapters`` is the same and ``opt_state`` is a flat dict, for inspection or export.

    Raises:
      FileNotFoundError: the folder does not exist.
      TypeError: ``tx`` is not an optimizer, ``target`` not a pair of trees of arrays, or
        ``config`` not an :class:`~adalora_jax.AdaLoraConfig`.
      ValueError: the folder is not a checkpoint of this library, is incomplete or damaged, or
        belongs to another config, optimizer or model (the message lists the differences);
        ``stacks`` is not such a dict or does not fit the checkpoint, or the layers of a stack
        differ in shape, scale or layout, or in what the configs give to their paths.

    >>> import optax, tempfile, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/run", adapters, tx.init(adapters), config, step=7)
    ...     resumed, content = restore(f"{folder}/run", tx), restore(f"{folder}/run")
    >>> resumed.step, resumed.config == config, int(resumed.allocator.budget)
    (7, True, 4)
    >>> _ = tx.update(adapters, resumed.opt_state, resumed.adapters)  # the run goes on
    >>> "allocator/step" in content.opt_state  # by name, without tx
    True

    A run of unrolled layers goes on in a scanned model:

    >>> layers = {f"layer_{i}/query": adapters["query"] for i in range(2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/run", layers, tx.init(layers), config)
    ...     scanned = restore(f"{folder}/run", tx, stacks={"layers": ["layer_0", "layer_1"]})
    >>> {path: adapter.p.shape for path, adapter in scanned.adapters.items()}
    {'layers/query': (2, 4, 5)}
    """
    if tx is not None and not all(callable(getattr(tx, n, None)) for n in ("init", "update")):
        raise TypeError(
            f"`tx={type(tx).__name__}`: is not an optimizer with init and update; pass what "
            "adalora(...) returned, or target=(adapters, opt_state)."
        )
    pair = isinstance(target, (tuple, list)) and len(target) == 2
    if target is not None and not (pair and all(map(_is_array, jax.tree.leaves(target)))):
        raise TypeError(
            f"`target={type(target).__name__}`: is not a pair of trees of arrays; pass (adapters, "
            "opt_state)."
        )
    if config is not None:
        check_config(config)
    folder = _folder(path)
    about = _metadata(folder)
    saved = {name: (tuple(e[0]), e[1]) for name, e in about["arrays"].items()}
    goes_on = tx is not None or target is not None
    config = _config(folder, about["config"], config, for_training=goes_on)
    facts = _read_facts(folder, about)
    moved = restack.moved_names(folder, saved, facts, {} if stacks is None else stacks)
    stored, saved = saved, restack.regroup(saved, moved, restack.regrouped_spec)
    facts = {f"adapters/{name}": known for name, known in facts.items()}
    facts = _subtree("adapters", restack.regroup(facts, moved, restack.regrouped_facts))
    if target is None:
        nested = restack.moved_keys(about["nested"], _subtree("adapters", moved))
        adapters = _adapters(_structs(_subtree("adapters", saved)), facts, nested)
        for found, adapter in pytree.adapters(adapters).items():
            check_adapter(adapter, f"adapters[{found!r}] in {folder}")
        opt_state = _structs(_subtree("opt_state", saved))
        target = adapters, jax.eval_shape(tx.init, adapters) if tx else opt_state
    whole, target = target, _unstacked(target)
    _check_facts(folder, facts, target[0])
    named = target[0], _map_allocators(lambda state: _by_path(_abstract(state)), target[1])
    expected = _state(*named)
    _check_specs(folder, saved, {name: _spec(leaf) for name, leaf in expected.items()})
    if goes_on:
        _check_config(target[1], config, str(folder))
        restack.check_ranks(config, allocator_state(target[1]).config, target[0], moved)
    structs = _structs(stored) | {name: expected[name] for name in saved if name not in moved}
    arrays = _read(folder, {name: _placed(leaf) for name, leaf in structs.items()})
    prints = jax.device_get(_fingerprints(arrays))
    if damaged := [name for name, entry in about["arrays"].items() if prints[name] != entry[2]]:
        raise ValueError(
            f"`{folder}`: is damaged, since {shorten(damaged)} changed after it was saved; "
            f"{_OTHER}."
        )
    arrays = restack.regroup(arrays, moved, restack.regrouped_array)
    for name in moved.keys() & arrays:
        arrays[name] = jax.device_put(arrays[name], _placed(expected[name]).sharding)
    allocator = _allocator(_subtree(about["allocator"], arrays), config, facts)
    for name, kind in restack.regroup(about["keys"], moved, lambda kinds, _: kinds[0]).items():
        arrays[name] = jax.random.wrap_key_data(arrays[name], impl=kind)
    filled = [
        jax.tree.unflatten(
            jax.tree.structure(node), [arrays[f"{part}/{n}"] for n in _flatten_named(node)]
        )
        for part, node in zip(_PARTS, named)
    ]
    if goes_on:
        filled[1] = _map_allocators(lambda state, like: _like(like, state), filled[1], target[1])
        allocator = allocator_state(filled[1])
    filled = restack_roles(list(whole), filled)
    return Checkpoint(filled[0], filled[1], allocator, about["step"], config, about["version"])


def _folder(path: str | os.PathLike[str]) -> pathlib.Path:
    # orbax takes absolute paths only.
    return pathlib.Path(os.path.abspath(folder_path("path", path)))


def _state(adapters: PyTree, opt_state: PyTree) -> dict[str, Any]:
    """Return the leaves of both trees as one flat dict."""
    return {
        f"{part}/{name}": leaf
        for part, node in zip(_PARTS, (adapters, opt_state))
        for name, leaf in _flatten_named(node).items()
    }


def _map_allocators(function: Callable[..., PyTree], opt_state: PyTree, *rest: PyTree) -> PyTree:
    """Return an optimizer's state with a function applied to each allocator's state in it."""

    def each(node: PyTree, *others: PyTree) -> PyTree:
        return function(node, *others) if is_allocator_state(node) else node

    return jax.tree.map(each, opt_state, *rest, is_leaf=is_allocator_state)


def _by_path(state: AllocatorState) -> AllocatorState:
    """Return the state with dicts by path, in which it is stored whatever the roles of a model."""
    state = pytree.unwrap_variables(state)
    return state._replace(**{name: dict(getattr(state, name)) for name in _BY_ROLE})


def _abstract(tree: PyTree) -> PyTree:
    """Return a tree with ``jax.ShapeDtypeStruct`` in place of its arrays, to slice no array."""

    def struct(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None)
        )

    return jax.tree.map(struct, pytree.unwrap_variables(tree))


def _unstacked(target: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
    """Return the target with separate adapters, as ``jax.ShapeDtypeStruct`` if it has stacked ones.

    Checkpoints are stored by path.
    """

    def plain(node: PyTree) -> PyTree:
        return unstack(_abstract(node)) if pytree.is_stacked(node) else node

    adapters, opt_state = jax.tree.map(plain, tuple(target), is_leaf=pytree.is_stacked)
    return adapters, opt_state


def _like(target: AllocatorState, state: AllocatorState) -> AllocatorState:
    """Return a state of dicts by path in the roles, Variables and shardings of ``target``."""
    values = pytree.unwrap_variables(target)
    roles = values.masks.roles
    state = state._replace(**{name: stack(roles, getattr(state, name)) for name in _BY_ROLE})

    def place(leaf: jax.Array, like: PyTree) -> jax.Array:
        sharding = getattr(like, "sharding", None)
        return leaf if sharding in (None, leaf.sharding) else jax.device_put(leaf, sharding)

    return pytree.match_containers(target, jax.tree.map(place, state, values))


def _flatten_named(node: PyTree) -> dict[str, Any]:
    """Return ``{name: leaf}``, with equal names for a dict, a Flax dict and an NNX State."""
    named: dict[str, Any] = {}
    for path, leaf in tree_util.tree_flatten_with_path(node)[0]:
        if (name := leaf_name(path)) in named:
            raise ValueError(
                f"`{name}`: is the path of two leaves; rename the key with a '/' in it."
            )
        named[name] = leaf
    return named


def _subtree(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries at and under ``prefix``, with the prefix removed from their names."""
    return {
        name[len(prefix) + 1 :]: entry
        for name, entry in named.items()
        if name == prefix or name.startswith(f"{prefix}/")
    }


def _allocator_name(opt_state: PyTree) -> str:
    nodes = tree_util.tree_flatten_with_path(opt_state, is_leaf=is_allocator_state)[0]
    inside = next(leaf_name(path) for path, node in nodes if is_allocator_state(node))
    return f"opt_state/{inside}".rstrip("/")


def _structs(specs: Mapping[str, _Spec]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in specs.items()}


def _adapters(
    named: Mapping[str, Any],
    facts: Mapping[str, dict[str, Any]] | None = None,
    nested: Mapping[str, list[str]] | None = None,
) -> dict[str, PyTree]:
    """Rebuild ``{path: Adapter}`` and the nesting of all other leaves from a flat dict."""
    rest = dict(named)
    found: dict[str, Any] = {}
    for stem in [name[: -len("lam")] for name in rest if f"/{name}".endswith("/lam")]:
        names = [f"{stem}{field}" for field in Adapter._fields]
        if all(name in rest for name in names):
            path = stem.removesuffix("/")
            known = (facts or {}).get(path, {})
            found[path] = Adapter(*(rest.pop(name) for name in names), **known)
    for name, leaf in rest.items():
        *parents, last = (nested or {}).get(name, [name])
        node = found
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return found


def _facts_of(adapters: PyTree) -> dict[str, Any]:
    """Return ``{path: [scale, layout]}`` of the adapters as JSON values."""
    return {
        path: [adapter.scale, adapter.layout and adapter.layout.to_dict()]
        for path, adapter in pytree.adapters(adapters).items()
    }


def _read_facts(folder: pathlib.Path, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return ``{path: {"scale": ..., "layout": ...}}`` of a checkpoint.

    Raises:
      ValueError: these values, or the nesting of the other leaves, are malformed.
    """
    try:
        facts = {
            path: {"scale": scale, "layout": layout and Layout.from_dict(layout)}
            for path, (scale, layout) in about["facts"].items()
        }
        nested = about["nested"].items()
        texts = all(isinstance(n, str) and all(isinstance(p, str) for p in ps) for n, ps in nested)
    except (AttributeError, KeyError, TypeError, ValueError):
        facts, texts = {"": {"scale": ""}}, False

    def is_scale(s: object) -> bool:
        return s is None or (isinstance(s, (int, float)) and math.isfinite(s))

    if not texts or not all(is_scale(known["scale"]) for known in facts.values()):
        raise ValueError(
            f"`{folder}`: is damaged, since its metadata in 'adalora' is not as saved; {_OTHER}."
        )
    return facts


def _check_facts(
    folder: pathlib.Path, facts: Mapping[str, dict[str, Any]], adapters: PyTree
) -> None:
    """Raise if an adapter of the target has another scale or layout than the saved one."""
    for path, adapter in pytree.adapters(adapters).items():
        saved = facts.get(path, {"scale": None, "layout": None})
        given = {"scale": adapter.scale, "layout": adapter.layout}
        differing = [
            f"{name}={saved[name]} instead of {given[name]}"
            for name in given
            if saved[name] != given[name] and None not in (saved[name], given[name])
        ]
        if differing:
            raise ValueError(
                f"`{folder}`: is of another model or config, since {path!r} has "
                f"{shorten(differing)}; use the model and config that it was saved with."
            )


def _nested_paths(adapters: PyTree) -> dict[str, list[str]]:
    """Return ``{name: keys}`` of the leaves outside of adapters, to restore their nesting."""

    def is_node(node: object) -> bool:
        return pytree.is_adapter(node) or pytree.is_variable(node)

    flat = tree_util.tree_flatten_with_path(adapters, is_leaf=is_node)[0]

    def keys(path: KeyPath) -> list[str]:
        return [tree_util.keystr((key,), simple=True) for key in path]

    return {leaf_name(path): keys(path) for path, node in flat if not pytree.is_adapter(node)}


def _allocator(
    named: Mapping[str, jax.Array], config: AdaLoraConfig, facts: Mapping[str, dict[str, Any]]
) -> AllocatorState:
    averages = (_adapters(_subtree(name, named), facts) for name in ("sensitivity", "uncertainty"))
    scalars = {name: named[name] for name in ("step", "budget", "applied", "overridden", "penalty")}
    sensitivity, uncertainty = averages
    roles = group_by_role(sensitivity)
    return AllocatorState(
        masks=stack(roles, _subtree("masks", named)),
        sensitivity=stack(roles, sensitivity),
        uncertainty=stack(roles, uncertainty),
        config=config,
        **scalars,
    )


def _is_array(leaf: PyTree) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))


def _is_key(leaf: PyTree) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key(entry: Sequence[Any], kind: str) -> jax.ShapeDtypeStruct:
    """Return the abstract random key whose data is an array of the given shape and dtype."""
    wrap = functools.partial(jax.random.wrap_key_data, impl=kind)
    return jax.eval_shape(wrap, jax.ShapeDtypeStruct(tuple(entry[0]), entry[1]))


def _data(leaf: ArrayLike) -> jax.Array:
    """Return the array that is stored for a leaf, since orbax cannot store random keys."""
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _spec(leaf: ArrayLike) -> _Spec:
    data = jax.eval_shape(_data, leaf)
    return data.shape, data.dtype.name


def _placed(leaf: PyTree) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and sharding that orbax restores a leaf with."""
    sharding = None if _is_key(leaf) else getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(*_spec(leaf), sharding=sharding)


@jax.jit
def _fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return a checksum of the bits of each array, independent of its sharding."""
    return {name: _fingerprint(array) for name, array in arrays.items()}


def _fingerprint(array: jax.Array) -> jax.Array:
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    bits = bits * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> jnp.uint32(15))) * jnp.uint32(0x85EBCA77)
    return jnp.sum(bits, dtype=jnp.uint32)


def _digest(about: Mapping[str, Any]) -> str:
    """Return a checksum of a checkpoint's metadata, which includes the step and the config."""
    read = json.loads(json.dumps({name: about[name] for name in about if name != "digest"}))
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _metadata(folder: pathlib.Path) -> dict[str, Any]:
    """Return a checkpoint's metadata, validated before any array is read.

    Raises:
      FileNotFoundError: the folder does not exist.
      ValueError: the folder is not a checkpoint of this version's format, or is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`{folder}`: is not a folder; pass the folder of a checkpoint.")
    entries = sorted(entry.name for entry in folder.iterdir())
    if not {"adalora", "state"} <= set(entries):
        steps = [name for name in entries if (folder / name / "adalora").is_dir()]
        way_out = f"one of its steps: {shorten(steps)}" if steps else "the folder of a checkpoint"
        raise ValueError(
            f"`{folder}`: is not a checkpoint of adalora_jax, which has the folders 'adalora' and "
            f"'state', since it contains {shorten(entries) or 'nothing'}; pass {way_out}."
        )
    about = _orbax(folder, adalora=ocp.args.JsonRestore())["adalora"]  # pyright: ignore[reportCallIssue]
    form = about.get("format") if isinstance(about, Mapping) else None
    if form != _FORMAT:
        raise ValueError(
            f"`{folder}`: has the format {form!r}, but this version reads {_FORMAT!r}; read it "
            "with the version of adalora_jax that saved it."
        )
    try:
        sizes = [_size(*entry) for entry in about["arrays"].values()]
        well_formed = (
            isinstance(about["step"], int)
            and isinstance(about["config"], Mapping)
            and f"{about['allocator']}/step" in about["arrays"]
            and all(
                f"{about['allocator']}/{name}" in about["arrays"]
                for name in ("budget", "applied", "overridden", "penalty")
            )
            and isinstance(about["version"], str)
            and all(_is_key(_key(about["arrays"][n], kind)) for n, kind in about["keys"].items())
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        sizes, well_formed = [], False
    if not well_formed or about.get("digest") != _digest(about):
        raise ValueError(
            f"`{folder}`: is damaged, since its metadata in 'adalora' is not as saved; {_OTHER}."
        )
    stored = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if sum(sizes) > _MOST_COMPRESSED * stored:
        raise ValueError(
            f"`{folder}`: is damaged or forged, since it declares {sum(sizes)} bytes of arrays, "
            f"more than its {stored} bytes of files can contain; {_OTHER}."
        )
    return dict(about)


def _size(shape: list[int], dtype: str, fingerprint: int) -> int:
    """Return the size in bytes of an array that the metadata describes.

    Raises:
      TypeError, ValueError: the description is malformed.
    """
    ints = all(type(n) is int and n >= 0 for n in [*shape, fingerprint])
    if not ints or jnp.dtype(dtype).kind not in "biufV" or jnp.dtype(dtype).hasobject:
        raise ValueError(dtype)
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def _config(
    folder: pathlib.Path, saved: Mapping[str, Any], config: AdaLoraConfig | None, for_training: bool
) -> AdaLoraConfig:
    if config is None:
        config = AdaLoraConfig.from_dict(saved)
        if for_training and (lost := config.missing_functions()):
            raise ValueError(
                f"`config=None`: {folder} was saved with functions in its config, which a file "
                "cannot store: "
                f"{shorten(f'{name} ({function})' for name, function in lost.items())}; pass the "
                "config that has them, restore(..., config=config)."
            )
        return config
    saved = AdaLoraConfig.from_dict(saved).to_dict()
    given = config.to_dict() | {"warn_small_start": saved["warn_small_start"]}  # not of the run
    if differing := _differing(saved, given):
        raise ValueError(
            f"`config`: {folder} was saved with another config: {shorten(differing)}; continue "
            "with the saved one, restore(path).config, or start a new run."
        )
    return config


def _differing(saved: Mapping[str, object], given: Mapping[str, object]) -> list[str]:
    """Return the fields in which two configs differ, with their values."""
    return [
        f"{name}={saved.get(name)!r} instead of {given.get(name)!r}"
        for name in sorted({*saved, *given})
        if saved.get(name) != given.get(name)
    ]


def _check_config(opt_state: PyTree, config: AdaLoraConfig, argument: str) -> None:
    """Raise if the config in an optimizer's state differs in a field of the run."""
    configs = allocator_state(opt_state).config, config
    numbers = [{name: c.to_dict()[name] for name in _OF_THE_RUN} for c in configs]
    if differing := _differing(*numbers):
        raise ValueError(
            f"`{argument}`: the optimizer has another config: {shorten(differing)}; use the "
            "config that was passed to adalora(...)."
        )


def _check_specs(
    folder: pathlib.Path, saved: Mapping[str, _Spec], expected: Mapping[str, _Spec]
) -> None:
    def show(spec: _Spec) -> str:
        return f"{spec[1]}{list(spec[0])}"

    differing = {
        "missing": [name for name in expected if name not in saved],
        "not expected": [name for name in saved if name not in expected],
        "of another shape or dtype": [
            f"{name} ({show(saved[name])}, not {show(spec)})"
            for name, spec in expected.items()
            if name in saved and saved[name] != spec
        ],
    }
    if any(differing.values()):
        found = ", ".join(
            f"{kind} ({shorten(names)})" for kind, names in differing.items() if names
        )
        raise ValueError(
            f"`{folder}`: is of another model, optimizer or config, with leaves that are {found}; "
            "restore it without tx and target to see its contents, or pass `stacks` if one of the "
            "two models is scanned and the other is not."
        )


def _read(
    folder: pathlib.Path, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    restore = ocp.args.StandardRestore(abstract)  # pyright: ignore[reportCallIssue]
    return dict(_orbax(folder, state=restore)["state"])


def _orbax(folder: pathlib.Path, **items: ocp.args.CheckpointArgs) -> Any:
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(folder, args=ocp.args.Composite(**items))
    except Exception as error:  # orbax, tensorstore and the file system raise many types
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"`{folder}`: is damaged, since orbax cannot read it ({reason:.200}); {_OTHER}."
        ) from error
