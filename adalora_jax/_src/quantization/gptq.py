"""GPTQ checkpoints of Hugging Face models, in their packed form.

A linear layer of ``in`` inputs and ``out`` outputs, in groups of g inputs, has four tensors:

===========  ====================================  ==============================================
tensor       shape and dtype                       content
===========  ====================================  ==============================================
``qweight``  ``[in · bits / 32, out]`` int32       the weight, 32 / bits inputs per word
``qzeros``   ``[in / g, out · bits / 32]`` int32   zero points, 32 / bits outputs per word
``scales``   ``[in / g, out]`` float16             one scale per group and output
``g_idx``    ``[in]`` int32                        group of each input, in any order for act-order
===========  ====================================  ==============================================

The lowest bits of a word are the first input or output, and
``W[i, o] = scales[g_idx[i], o] · (qweight[i, o] − qzeros[g_idx[i], o])``.
The format ``"gptq"`` (v1) stores zero points minus one. Its writers subtract 1 from every field of
the packed words with borrows between fields, so reading adds 1 to every field with carries.
``"gptq_v2"`` stores the zero points themselves.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from adalora_jax._src.core.explicit_axes import with_auto_axes
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import nnx_variables
from adalora_jax._src.modules.params import Model, parameters_of, replaced
from adalora_jax._src.quantization import packed
from adalora_jax._src.quantization.packed import Packed
from adalora_jax._src.tensorfile import FLOATS, TensorFile, folder_path

_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_FORMATS = ("gptq", "gptq_v2")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GptqWeight(Packed):
    """Weight in GPTQ's packed form; in a stack of layers all arrays have leading stack axes.

    Attributes:
      qweight: ``[in · bits / 32, out]`` uint32, the packed weight.
      qzeros: ``[groups, out · bits / 32]`` uint32, the packed zero points, without v1's offset.
      scales: ``[groups, out]``, in the dtype of the dequantised weight.
      groups: ``[in]`` int32, the group of each input; None if groups are consecutive inputs.
      bits: bits per number, 4 or 8; static.
      layer_shape: shape of the weight of one layer; static.
    """

    qweight: jax.Array
    qzeros: jax.Array
    scales: jax.Array
    groups: jax.Array | None
    bits: int = dataclasses.field(metadata={"static": True})
    layer_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, stack axes included."""
        return (*self.qweight.shape[:-2], *self.layer_shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the scales and of the dequantised weight."""
        return self.scales.dtype

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """Return the weight, computed in float32 and rounded once; its gradient is zero.

        Args:
          dtype: of the result; None for that of the scales.
        """
        layer = _dequantize
        for _ in self.qweight.shape[:-2]:
            layer = jax.vmap(layer)
        weight = jax.lax.stop_gradient(self)
        dense = with_auto_axes(lambda w: layer(w).reshape(self.shape), self.qweight, weight)
        return dense.astype(self.dtype if dtype is None else dtype)

    def requantize(self, weight: jax.Array) -> Packed:
        """Raise an error: a GPTQ weight cannot be requantised.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "`to='requantize'`: a GPTQ weight cannot be requantised, because its numbers were "
            "chosen layer by layer on calibration data, which is not available; merge into a "
            "dtype, or into a recipe such as 'int8'."
        )

    def as_shape(self, layer_shape: tuple[int, ...], dtype: DTypeLike) -> GptqWeight:
        """Return the weight with the shape ``own`` per layer, dequantised to ``dtype``."""
        return dataclasses.replace(
            self, layer_shape=tuple(layer_shape), scales=self.scales.astype(dtype)
        )


def _dequantize(weight: GptqWeight) -> jax.Array:
    """Return the weight of one layer as ``[in, out]`` float32."""
    values = packed.unpack(weight.qweight, 0, weight.bits).astype(jnp.float32)
    zeros = packed.unpack(weight.qzeros, 1, weight.bits).astype(jnp.float32)
    scales = weight.scales.astype(jnp.float32)
    if weight.groups is not None:
        return scales[weight.groups] * (values - zeros[weight.groups])
    count, out = scales.shape
    grouped = values.reshape(count, -1, out)
    return (scales[:, None] * (grouped - zeros[:, None])).reshape(-1, out)


def from_tensors(
    qweight: ArrayLike,
    qzeros: ArrayLike,
    scales: ArrayLike,
    g_idx: ArrayLike | None = None,
    *,
    checkpoint_format: str = "gptq",
    dtype: DTypeLike = jnp.float32,
    name: str = "the layer",
) -> GptqWeight:
    """Return a weight made of the four tensors of a checkpoint.

    Args:
      qweight: the packed weight, ``[in · bits / 32, out]`` int32.
      qzeros: the packed zero points, ``[groups, out · bits / 32]`` int32.
      scales: ``[groups, out]``.
      g_idx: the group of each input, ``[in]``; None if groups are consecutive inputs.
      checkpoint_format: ``"gptq"`` or ``"gptq_v2"``.
      dtype: dtype of the dequantised weight and of the scales.
      name: name of the layer for error messages.

    Raises:
      ValueError: the format is unknown, shapes or dtypes are inconsistent, or the number of bits is
        neither 4 nor 8.

    >>> weight = from_tensors(
    ...     np.full((2, 8), 0x98765432, np.uint32).view(np.int32),  # 2 ... 9 in each column
    ...     np.full((1, 1), 0x77777777, np.int32),  # 8, less one
    ...     np.full((1, 8), 0.5, np.float16),
    ... )
    >>> weight.shape, weight.dequantize()[:8, 0]
    ((16, 8), Array([-3. , -2.5, -2. , -1.5, -1. , -0.5,  0. ,  0.5], dtype=float32))
    """
    if checkpoint_format not in _FORMATS:
        raise ValueError(
            f"`checkpoint_format={checkpoint_format!r}`: must be one of "
            f"{', '.join(map(repr, _FORMATS))}; export the checkpoint in one of them."
        )
    qweight, qzeros, scales = (np.asarray(tensor) for tensor in (qweight, qzeros, scales))
    shapes = f"{name} has qweight {qweight.shape}, qzeros {qzeros.shape}, scales {scales.shape}"
    if qweight.dtype != np.int32 or qzeros.dtype != np.int32:
        raise ValueError(
            f"`directory`: the qweight and qzeros of {name} must be int32, not {qweight.dtype} and "
            f"{qzeros.dtype}; export the checkpoint again."
        )
    if not qweight.ndim == qzeros.ndim == scales.ndim == 2 or qzeros.shape[0] != scales.shape[0]:
        raise ValueError(
            f"`directory`: {shapes}, which do not fit each other; export the checkpoint again."
        )
    count, out = scales.shape
    bits, rest = divmod(32 * qzeros.shape[1], out)
    if rest or bits not in (4, 8) or qweight.shape[1] != out:
        raise ValueError(
            f"`directory`: {shapes}, packed in {bits} bits, but only 4 and 8 can be read; quantise "
            "the model to 4 or 8 bits."
        )
    ins = qweight.shape[0] * 32 // bits
    groups = None
    if g_idx is not None:
        groups = np.asarray(g_idx)
        if groups.shape != (ins,) or groups.min() < 0 or groups.max() >= count:
            raise ValueError(
                f"`directory`: the g_idx of {name}, of shape {groups.shape}, must give each of "
                f"{ins} inputs one of {count} groups; export the checkpoint again."
            )
    if groups is None or (ins % count == 0 and (groups == np.arange(ins) // (ins // count)).all()):
        if ins % count:
            raise ValueError(
                f"`directory`: {name} has {ins} inputs, which are not {count} groups of one size; "
                "export the checkpoint with its g_idx."
            )
        groups = None
    words = qzeros.view(np.uint32)
    if checkpoint_format == "gptq":
        one = {4: 0x11111111, 8: 0x01010101}[bits]
        words = words + np.uint32(one)  # modulo 2³²
    return GptqWeight(
        qweight=jnp.asarray(qweight.view(np.uint32)),
        qzeros=jnp.asarray(words),
        scales=jnp.asarray(scales).astype(dtype),
        groups=None if groups is None else jnp.asarray(groups, jnp.int32),
        bits=bits,
        layer_shape=(ins, out),
    )


def read_gptq(
    directory: str | pathlib.Path, dtype: DTypeLike = jnp.float32
) -> dict[str, dict[str, Any]]:
    """Return all GPTQ layers of a checkpoint: ``{name: {"kernel": GptqWeight, "bias": array}}``.

    The packed tensors are copied from the files to the device without dequantising, one layer at a
    time. A layer without a bias has None.

    Args:
      directory: a directory with ``*.safetensors`` and, for the checkpoint's format, a
        ``config.json`` or ``quantize_config.json``.
      dtype: dtype of the dequantised weights.

    Raises:
      ValueError: ``directory`` is not a folder; the checkpoint has no GPTQ layer or uses another
        quantisation method; or a layer lacks a tensor or has inconsistent ones.
    """
    directory = folder_path("directory", directory)
    if not directory.is_dir():
        raise ValueError(f"`{directory}`: is not a folder; pass the folder of a GPTQ checkpoint.")
    files = sorted(directory.glob("*.safetensors"))
    settings = _settings(directory)
    found: dict[str, dict[str, tuple[pathlib.Path, str]]] = {}
    for file in files:
        with TensorFile(file) as tensors:
            for key in tensors.specs:
                name, _, tensor = key.rpartition(".")
                found.setdefault(name, {})[tensor] = (file, key)
    layers = {name: places for name, places in found.items() if "qweight" in places}
    if not layers:
        raise ValueError(
            f"`{directory}`: has {len(files)} safetensors files and no qweight in them; pass the "
            "folder of a GPTQ checkpoint."
        )
    result = {}
    for name, places in layers.items():
        tensors = {t: _read(*places[t]) for t in (*_TENSORS, "bias") if t in places}
        bias = tensors.pop("bias", None)
        missing = [t for t in _TENSORS[:3] if t not in tensors]
        if missing:
            raise ValueError(
                f"`{directory}`: {name!r} has a qweight but no {' and no '.join(missing)}; export "
                "the checkpoint again."
            )
        weight = from_tensors(
            **tensors,
            checkpoint_format=settings.get("checkpoint_format") or "gptq",
            dtype=dtype,
            name=repr(name),
        )
        result[name] = {"kernel": weight, "bias": None if bias is None else jnp.asarray(bias)}
    return result


def _read(file: pathlib.Path, key: str) -> np.ndarray:
    with TensorFile(file) as tensors:
        return tensors.read(key, (*FLOATS, "I32"))


def _settings(directory: pathlib.Path) -> dict[str, Any]:
    """Return the checkpoint's quantisation settings; empty if there are none.

    Raises:
      ValueError: the settings are those of another method than GPTQ.
    """
    for file in ("quantize_config.json", "config.json"):
        if (directory / file).exists():
            settings = json.loads((directory / file).read_text(encoding="utf-8"))
            settings = settings.get(
                "quantization_config", settings if file.startswith("quantize") else {}
            )
            method = settings.get("quant_method", "gptq")
            if method != "gptq":
                raise ValueError(
                    f"`{directory / file}`: has quant_method={method!r}, not 'gptq'; pass the "
                    "folder of a GPTQ checkpoint."
                )
            if settings:
                return settings
    return {}


def load_gptq(
    directory: str | pathlib.Path,
    model: Model,
    variables: Mapping[str, PyTree] | None = None,
    *,
    names: Mapping[str, Any] | Callable[[str], Any] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> PyTree:
    """Return a model with the kernels of a GPTQ checkpoint, in their packed form.

    A kernel (`GPTQ <https://arxiv.org/abs/2210.17323>`_) computes with
    ``W[i, o] = scales[g, o] · (qweight[i, o] − qzeros[g, o])``, where g is the group of input i.
    The biases of these layers are loaded, too. All other parameters are unchanged. The kernels to
    be replaced may be shapes, as ``jax.eval_shape`` or ``nnx.eval_shape`` returns them.

    Args:
      directory: directory of a Hugging Face checkpoint with ``*.safetensors``.
      model: a linen or NNX module; not changed.
      variables: the variables of a linen module; not changed.
      names: from a layer's path in the model to its name in the checkpoint: a dict, or a function
        that returns None for layers that are not in the checkpoint. A list of names is a stack of
        layers in this order. By default the name is the path with ``.`` for ``/``, and layers
        without such a name in the checkpoint are unchanged.
      dtype: floating-point dtype of the dequantised kernels.

    Returns:
      ``(module, variables)`` for linen, as :func:`adalora_jax.quantization.quantize` returns them;
      a copy of the model for NNX.

    Raises:
      TypeError: ``model`` is neither an NNX module nor a linen module with its variables.
      ValueError: no layer of the model has a name in the checkpoint, a name is not in the
        checkpoint, shapes differ, the model lacks a bias that is not zero, or the checkpoint is not
        a valid GPTQ checkpoint.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> tensors = {
    ...     "up.qweight": np.full((2, 8), 0x98765432, np.uint32).view(np.int32),  # 2 ... 9
    ...     "up.qzeros": np.full((1, 1), 0x77777777, np.int32),  # 8, less one
    ...     "up.scales": np.full((1, 8), 0.5, np.float16),
    ... }
    >>> model = nnx.Sequential(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file(tensors, f"{folder}/model.safetensors")
    ...     loaded = load_gptq(folder, model, names={"layers/0": "up"})
    >>> loaded(jnp.ones((1, 16)))[0, :3]  # 2 * (2 + ... + 9 - 8 * 8) / 2
    Array([-20., -20., -20.], dtype=float32)
    """
    layers = read_gptq(directory, dtype)
    params = parameters_of(model, variables)
    named = _named(params, layers, names)
    kernels, biases = {}, {}
    for path, parts in named.items():

        def place(name: str, path: str = path) -> str:
            return f"{path}/{name}".lstrip("/")

        kernels[place("kernel")] = _kernel(parts, tuple(params[place("kernel")].shape), path, dtype)
        bias = _bias(parts, params.get(place("bias")), path)
        biases |= {} if bias is None else {place("bias"): bias}
    if isinstance(model, nnx.Module):
        model = packed.pack_nnx(model, kernels)
        modules = dict(nnx_variables.modules(model))
        for path, bias in biases.items():
            parent, _, name = path.rpartition("/")
            getattr(modules[parent], name).set_value(bias)
        return model
    module, variables = packed.pack_linen(model, variables or {}, kernels)
    return module, {**variables, "params": replaced(variables["params"], biases)}


def _bias(parts: list[dict[str, Any]], place: PyTree, path: str) -> jax.Array | None:
    """Return the checkpoint's bias in the shape and dtype of the model's; None if there is none.

    Raises:
      ValueError: the model has no bias, and the checkpoint's is not zero.
    """
    given = [part["bias"] for part in parts]
    if any(bias is None for bias in given):
        return None
    if place is not None:
        return jnp.stack(given).reshape(place.shape).astype(place.dtype)
    if any(jnp.any(bias != 0) for bias in given):
        raise ValueError(
            f"`model`: {path!r} has a bias in the checkpoint but none in the model; make the layer "
            "with use_bias=True."
        )
    return None  # some writers add a zero bias to every layer


def _kernel(
    parts: list[dict[str, Any]], shape: tuple[int, ...], path: str, dtype: DTypeLike
) -> GptqWeight:
    """Return the kernel of one layer of this shape, or of a stack of layers.

    Raises:
      ValueError: the shape does not fit the checkpoint's matrices.
    """
    stack = (len(parts),) if len(parts) > 1 else ()
    kernel_shape = shape[len(stack) :]
    for part in parts:
        ins, outs = part["kernel"].layer_shape
        splits = [np.prod(kernel_shape[:n], dtype=int) for n in range(1, len(kernel_shape))]
        size = np.prod(kernel_shape)
        if shape[: len(stack)] != stack or ins not in splits or ins * outs != size:
            raise ValueError(
                f"`model`: {path!r} has a kernel of shape {shape}, which does not read as "
                f"{[*stack]} matrices of {ins} x {outs}, as the checkpoint has it; pass the model "
                "of this checkpoint, or another name in names."
            )
    weights = [part["kernel"].as_shape(kernel_shape, dtype) for part in parts]
    if len(weights) == 1:
        return weights[0]
    if any(weight.groups is not None for weight in weights):
        weights = [_with_groups(weight) for weight in weights]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *weights)


def _with_groups(weight: GptqWeight) -> GptqWeight:
    if weight.groups is not None:
        return weight
    ins, count = weight.qweight.shape[0] * 32 // weight.bits, weight.scales.shape[0]
    return dataclasses.replace(weight, groups=jnp.arange(ins, dtype=jnp.int32) // (ins // count))


def _named(
    params: Iterable[str],
    layers: Mapping[str, dict[str, Any]],
    names: Mapping[str, Any] | Callable[[str], Any] | None,
) -> dict[str, list[dict[str, Any]]]:
    """Return ``{path: layers of the checkpoint}``, several layers for a stack.

    Raises:
      ValueError: a name is not in the checkpoint, or no path has a name.
    """
    named = {}
    for place in params:
        path, _, name = place.rpartition("/")
        if name != "kernel":
            continue
        if names is None:
            found = path.replace("/", ".")
            found = found if found in layers else None
        else:
            found = names.get(path) if isinstance(names, Mapping) else names(path)
        if found is None:
            continue
        found = [found] if isinstance(found, str) else list(found)
        for one in found:
            if one not in layers:
                raise ValueError(
                    f"`names`: gives {one!r} for {path!r}, which is not a GPTQ layer of the "
                    f"checkpoint ({', '.join(list(layers)[:6])} ...); name one of its layers."
                )
        named[path] = [layers[one] for one in found]
    if not named:
        raise ValueError(
            f"`names`: no layer of the checkpoint ({', '.join(list(layers)[:4])} ...) matches a "
            f"layer of the model ({', '.join(list(params)[:4])} ...); map the names with "
            "names={path: name}."
        )
    return named
