"""Base models from Hugging Face checkpoints: tensors loaded as parameters of a Flax model."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.tree_util import KeyPath, tree_map_with_path
from jax.typing import DTypeLike

from adalora_jax._src.core import pytree, rank_spec
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.huggingface.names import Names, as_names
from adalora_jax._src.huggingface.reading import ParamReading, ParamSource
from adalora_jax._src.huggingface.weights import Weights, read_weights
from adalora_jax._src.modules import (
    layers,
    linen_frontend,
    linen_layers,
    nnx_candidates,
    nnx_frontend,
    nnx_variables,
    sharding,
)
from adalora_jax._src.modules.params import Model, by_path, parameters_of
from adalora_jax._src.tensorfile import TensorFile, folder_path, resolve_within

Allowed: TypeAlias = bool | str | Sequence[str]
_Place: TypeAlias = NamedSharding | PartitionSpec | None
# Buffers that older versions of transformers stored in checkpoints.
_BUFFERS = re.compile(r"(.*\.)?(position_ids|rotary_emb\.inv_freq|attn\.(masked_)?bias)")
_SHOWN = 6
_NO_MESH = Mesh(np.empty((), object), ())


def load_base(
    directory: str | os.PathLike[str],
    model: Model,
    variables: Mapping[str, PyTree] | None = None,
    *args: PyTree,
    names: Names = None,
    dtype: DTypeLike | None = None,
    equations: Mapping[str, str] | None = None,
    allow_missing: Allowed = False,
    allow_unused: Allowed = False,
    progress: Callable[[list[str]], Iterable[str]] | None = None,
    **kwargs: Any,
) -> PyTree:
    """Load the parameters of a model from a Hugging Face checkpoint.

    PyTorch weights ``[out, in]`` are transposed, attention heads get a separate axis, scanned
    layers are stacked, and projections are split or concatenated as the name map specifies. Names,
    shapes and dtypes are checked against the files' headers before any tensor is read. Tensors are
    then read one at a time, so memory holds the result and one tensor. The files may be untrusted:
    no code in them is executed.

    Args:
      directory: a folder with ``model.safetensors``, or with ``model.safetensors.index.json`` and
        the files it names; or one safetensors file.
      model: a linen or NNX module.
      variables: the variables of a linen module; None for NNX. Shapes suffice: from
        ``jax.eval_shape(model.init, ...)``, or for NNX a model from ``nnx.eval_shape``. Parameters
        get the shardings of these arrays, or those of their sharding metadata if there is a mesh.
      *args: arguments of a call of the linen model. They are needed for weights whose axes only
        the call determines, those of einsum layers. The model is traced, not run.
      **kwargs: keyword arguments of that call.
      names: the names of the layers in the checkpoint: a family such as ``"llama"``, pairs of
        names, or a :class:`~adalora_jax.huggingface.NameMap`. Names refer to modules; a pair may
        also name a parameter. Without it ``/`` becomes ``.``.
      dtype: floating-point dtype of the result; by default that of each of the model's parameters.
      equations: ``{pattern: equation}`` for weights that belong neither to a Flax layer nor to an
        Einsum module, with the weight as the second operand: ``{"mlp/w_in": "...d,df->...f"}``.
      allow_missing: True, or regexes of the parameters that keep their value in the model if the
        checkpoint does not contain them, such as a new head.
      allow_unused: True, or regexes of the checkpoint's tensors that may remain unused.
      progress: function that wraps the list of parameters during iteration, such as ``tqdm.tqdm``.

    Returns:
      The variables with the loaded ``params`` for linen, a new model for NNX.

    Raises:
      FileNotFoundError: a file is missing.
      TypeError: ``model`` is neither an NNX module nor a linen module with its variables.
      ValueError: a file is damaged or malicious; parameters are missing in the checkpoint, tensors
        remain unused, or shapes or dtypes do not fit (the message names them); a pattern in
        ``equations`` matches no parameter; or a number overflows ``dtype``.

    >>> import flax.linen as nn, pathlib, tempfile
    >>> from safetensors.numpy import save_file
    >>> model, x = nn.Sequential([nn.Dense(2)]), jnp.ones((1, 3))
    >>> shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> tensors = {"up.weight": np.arange(6.0).reshape(2, 3), "up.bias": np.ones(2)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(tensors, pathlib.Path(folder, "model.safetensors"))
    ...     variables = load_base(folder, model, shapes, names={"layers_0": "up"})
    >>> model.apply(variables, x)
    Array([[ 4., 13.]], dtype=float32)
    """
    path = folder_path("directory", directory)
    single = path.suffix == ".safetensors" and path.is_file()
    weights = read_weights(path.parent, path.name) if single else read_weights(path)
    source = ParamSource(weights, as_names(names))
    leaves, places = _parameters(model, variables)
    known = _layers(model, variables, args, kwargs, leaves, equations or {})
    readings: dict[str, ParamReading] = {}
    missing: dict[str, str] = {}  # {path: the tensor name that was looked up}
    misfits: list[str] = []
    for name, leaf in leaves.items():
        try:
            found = source.reading(name, leaf.shape, known.get(name))
        except ValueError as error:
            misfits.append(str(error))
            continue
        if isinstance(found, ParamReading):
            readings[name] = found
        else:
            missing[name] = found
    _check(path, weights, readings, missing, misfits, (allow_missing, allow_unused))
    mesh, new = sharding.mesh_of(list(places.values())), {}
    # A mesh in the context would forbid writing blocks on single devices.
    with _opened(weights) as read, jax.set_mesh(_NO_MESH):
        for name in (progress or list)(list(readings)):
            leaf, reading = leaves[name], readings[name]
            wide = jnp.dtype(leaf.dtype if dtype is None else dtype)
            parts = ((index, _cast(reading, index, read, wide, name)) for index in reading.slices)
            target = _sharding(places.get(name), leaf, mesh)
            new[name] = _placed(reading, wide, target, parts)
    if variables is None:
        return nnx_variables.with_parameters(cast("Any", model), new)

    def put(path: KeyPath, leaf: PyTree) -> PyTree:
        return new.get(pytree.leaf_name(path), leaf)

    return {**variables, "params": tree_map_with_path(put, variables["params"])}


def _parameters(
    model: Model, variables: Mapping[str, PyTree] | None
) -> tuple[dict[str, Any], dict[str, _Place]]:
    """Return the parameters of the model and their shardings, both by path."""
    leaves = parameters_of(model, variables)
    if variables is None:
        places = {path: nnx_frontend.placement(variable) for path, variable in leaves.items()}
    else:
        places = by_path(linen_frontend.placement(variables))
    return leaves, {path: _without_abstract_mesh(place) for path, place in places.items()}


def _without_abstract_mesh(place: _Place) -> _Place:
    """Return the PartitionSpec of shapes made under ``jax.set_mesh``, whose mesh has no devices."""
    if isinstance(place, NamedSharding) and isinstance(place.mesh, AbstractMesh):
        return place.spec
    return place


def _layers(
    model: Model,
    variables: Mapping[str, PyTree] | None,
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, Any],
    leaves: Mapping[str, Any],
    equations: Mapping[str, str],
) -> dict[str, layers.Layout]:
    """Return the layouts of the weights by path, as far as model and ``equations`` determine them.

    Raises:
      ValueError: a pattern of ``equations`` matches no parameter, or its equation does not
        determine the inputs and outputs.
    """
    known: dict[str, layers.Layout] = {}
    if variables is None:
        for path, candidate in nnx_candidates.candidates(
            cast("Any", model), of_adapted=True
        ).items():
            if layer := candidate.layer:
                known[f"{path}/{layer.weight}".lstrip("/")] = layer
    elif args or kwargs:
        params = linen_layers.unboxed(variables)
        for path, candidate in linen_layers.candidates(
            cast("Any", model), variables, args, kwargs
        ).items():
            if layer := candidate.layer:
                known["/".join(pytree.weight_path(params, path, layer.weight))] = layer
    for pattern, equation in equations.items():
        fitting = [path for path in leaves if rank_spec.matches(pattern, path)]
        if not fitting:
            raise ValueError(
                f"`equations`: {pattern!r} matches no parameter; name one of the parameters: "
                f"{_list(leaves)}."
            )
        for path in fitting:
            axes = {path.rpartition("/")[2]: len(leaves[path].shape)}
            layer = layers.layer_of(None, axes, equation)
            if layer is None:
                raise ValueError(
                    f"`equations[{pattern!r}]={equation!r}`: does not determine the inputs and "
                    f"outputs of {path!r} {list(leaves[path].shape)}; write it in the form "
                    "'...d,df->...f', with the weight second."
                )
            known[path] = layer
    return known


def _check(
    path: Path,
    weights: Weights,
    readings: Mapping[str, ParamReading],
    looked_for: Mapping[str, str],
    misfits: list[str],
    allowed: tuple[Allowed, Allowed],
) -> None:
    """Raise one error with a line per mismatch between a checkpoint and a model, if any."""
    pieces = [p for reading in readings.values() for ps in reading.slices.values() for p in ps]
    used = {piece.key for piece in pieces}
    unused = [n for n in weights.specs if n not in used and not _BUFFERS.fullmatch(n)]
    unused = [name for name in unused if not _is_allowed(name, allowed[1])]
    missing = [
        f"{name!r}" + (f" (looked for {tensor!r})" if tensor else " (names has no entry for it)")
        for name, tensor in looked_for.items()
        if not _is_allowed(name, allowed[0])
    ]
    wrong = []
    if missing:
        wrong.append(
            f"`names`: the checkpoint has no tensor for the parameters {_list(missing)}; map them "
            "with names=, or keep their values with allow_missing=."
        )
    wrong += misfits[:_SHOWN]
    if misfits[_SHOWN:]:
        wrong.append(
            f"`model`: {len(misfits) - _SHOWN} more tensors do not fit; correct these first."
        )
    if unused and (missing or not misfits):
        wrong.append(
            f"`names`: the tensors {_list(map(repr, unused))} are not used; map their names with "
            "names=, or ignore them with allow_unused=."
        )
    if any(name.endswith(".qweight") for name in unused):
        wrong.append(
            "`directory`: has packed layers (qweight); load them with "
            "adalora_jax.quantization.load_gptq."
        )
    if wrong:
        problems = "\n".join(wrong)
        raise ValueError(f"`{path}`: {problems}")


def _is_allowed(name: str, allowed: Allowed) -> bool:
    if isinstance(allowed, bool):
        return allowed
    patterns = (allowed,) if isinstance(allowed, str) else allowed
    return any(rank_spec.matches(pattern, name) for pattern in patterns)


def _list(items: Iterable[str]) -> str:
    items = list(items)
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


@contextlib.contextmanager
def _opened(weights: Weights) -> Iterator[Callable[[str], np.ndarray]]:
    """Yield a function that reads a tensor by its name; files are opened on first use."""
    files = {tensor: name for name, specs in weights.files.items() for tensor in specs}
    with contextlib.ExitStack() as stack:
        opened: dict[str, TensorFile] = {}

        def read(key: str) -> np.ndarray:
            name = files[key]
            if name not in opened:
                opened[name] = stack.enter_context(TensorFile(resolve_within(weights.folder, name)))
            return opened[name].read(key)

        yield read


def _cast(
    reading: ParamReading,
    index: tuple[int, ...],
    read: Callable[[str], np.ndarray],
    dtype: np.dtype,
    name: str,
) -> np.ndarray:
    """Return a slice of a parameter, cast to ``dtype``.

    Raises:
      ValueError: ``dtype`` is not a floating-point type, or a finite number overflows it.
    """
    value = reading.value(index, read)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`dtype={dtype}`: must be a floating-point dtype for {name!r}; pass one, such as "
            "jnp.float32."
        )
    with np.errstate(over="ignore"):
        cast = value.astype(dtype, copy=False)
    is_narrower = jnp.finfo(dtype).max < jnp.finfo(value.dtype).max
    if is_narrower and np.isfinite(value).all() and not np.isfinite(cast).all():
        raise ValueError(
            f"`dtype={dtype}`: cannot represent some values of {name!r}; pass a wider dtype."
        )
    return cast


def _sharding(place: _Place, leaf: PyTree, mesh: Mesh | AbstractMesh | None) -> Sharding | None:
    """Return the sharding of a parameter; None for the default device."""
    if isinstance(place, PartitionSpec) and mesh is not None:
        place = NamedSharding(mesh, place)
    if isinstance(place, NamedSharding):
        return place
    return leaf.sharding if getattr(leaf, "committed", False) else None


_write = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


def _placed(
    reading: ParamReading,
    dtype: np.dtype,
    target: Sharding | None,
    parts: Iterable[tuple[tuple[int, ...], np.ndarray]],
) -> jax.Array:
    """Assemble an array on its devices, so that the host holds one part of it at a time."""
    shape = reading.shape
    everything = {None: (slice(None),) * len(shape)}
    blocks: Mapping[Any, Any] = (
        everything if target is None else target.addressable_devices_indices_map(shape)
    )
    spans = {
        device: [part.indices(size)[:2] for part, size in zip(index, shape)]
        for device, index in blocks.items()
    }
    arrays: dict[Any, jax.Array] = {}
    for index, part in parts:
        first = [0] * len(shape)
        for axis, number in zip(reading.stack, index):
            first[axis] = number
        for device, span in spans.items():
            # The intersection [low, high) of the part and the device's block, per axis.
            both = [(max(f, a), min(f + n, b)) for f, n, (a, b) in zip(first, part.shape, span)]
            if any(low >= high for low, high in both):
                continue
            block = part[tuple(slice(low - f, high - f) for (low, high), f in zip(both, first))]
            if not reading.stack:
                arrays[device] = jax.device_put(block, device)
                continue
            if device not in arrays:
                sizes = [b - a for a, b in span]
                arrays[device] = jnp.zeros(sizes, dtype, device=device)
            starts = [np.int32(low - a) for (low, _), (a, _) in zip(both, span)]
            arrays[device] = _write(arrays[device], block, starts)
    if target is None:
        return arrays[None]
    return jax.make_array_from_single_device_arrays(shape, target, [arrays[d] for d in spans])
