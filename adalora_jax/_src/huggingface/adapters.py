"""Whole adapters, written as PEFT saves them and read from what it saved."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from adalora_jax._src.core import pytree
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.evaluation import rank_pattern, unfinished
from adalora_jax._src.huggingface.files import PREFIX, AdapterFile, read_adapter, write_adapter
from adalora_jax._src.huggingface.matrices import (
    Matrix,
    common_scale,
    from_matrices,
    kernel_size,
    to_matrices,
)
from adalora_jax._src.huggingface.names import NameMap, Place, as_names
from adalora_jax._src.huggingface.saved import saved_from_torch, saved_to_torch

# What PEFT has in common with us and keeps; the layers are written out one by one.
_KEPT = ("total_step", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2")
_KEPT += ("orth_reg_weight", "lora_dropout", "init_lora_weights")
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


class Loaded(NamedTuple):
    """An adapter from a file, ready for the Flax model."""

    adapters: dict[str, Any]  # {path: Adapter}, and {path: parameters} of modules_to_save
    config: AdaLoraConfig  # its paths are those of the Flax model; adapt(model, config) fits
    masks: dict[str, np.ndarray]  # {path: [..., r]}: which triplets live


def save_pretrained(
    directory: str | os.PathLike[str],
    adapters: Mapping[str, Any],
    config: AdaLoraConfig,
    *,
    masks: Any = None,
    names: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes an AdaLoRA adapter that ``peft.PeftModel.from_pretrained`` loads.

    The masks decide what is written, whatever the values of λ: rows that they prune are cut, and
    ``rank_pattern`` says which, as PEFT does it. Everything else is written bit for bit, in its
    own dtype. PEFT has one alpha and one init_r for all layers: where adapters have different
    scales, λ is multiplied by the ratio, and init_r is the largest there is. What mattered
    in training alone and PEFT does not know (score, schedule, ...) is left out, so a run that goes
    on in PEFT goes on by PEFT's rules. PEFT's scale is ``alpha / (init_r + 1e-5)``. Adapters of
    queries, keys and values that PyTorch computes in one module become one with the rows of all
    three, each zero outside its third: the same function, and they come apart again when read.

    Args:
      directory: made if need be. Its two files are replaced one after the other, in an order in
        which nobody can read a mixture.
      adapters: ``{path: Adapter}`` and the parameters of ``modules_to_save``: the trained
        parameters with the masks applied, see :func:`adalora_jax.eval_params`.
      config: of the run, for PEFT's config file; the scale is that of the adapters.
      masks: the optimizer's state, or as in :func:`adalora_jax.masks`; without them every triplet
        is written.
      names: what the layers are called in PyTorch: a family such as ``"bert"``, pairs of names, or
        a :class:`~adalora_jax.huggingface.names.NameMap`. Without it ``/`` becomes ``.``.
      base_model: the base model's name on the Hub, or path, for the config.
      task_type: PEFT's, such as ``"CAUSAL_LM"``. With one of a classifier, such as ``"SEQ_CLS"``,
        that has to be among the adapters.

    Raises:
      ValueError: a path has no name in PyTorch, a parameter no form there, or a mask is missing.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from adalora_jax import Adapter
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)), scale=2.0)
    >>> config = AdaLoraConfig(total_step=10, init_r=4, target_r=2, target_modules=["query"])
    >>> masks = {"encoder/query": jnp.array([True, False, True, False])}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, {"encoder/query": adapter}, config, masks=masks)
    ...     loaded = load_pretrained(folder)
    >>> loaded.adapters["encoder/query"].p.shape, loaded.config.rank_pattern
    ((2, 6), (('encoder/query', (True, False, True, False)),))
    """
    _warn_unfinished(masks)
    names = as_names(names)
    scale = common_scale(adapters, config.scaling)
    pattern = None if masks is None else rank_pattern(masks)
    matrices, places = to_matrices(adapters, scale, pattern, names)
    most = max(config.init_r, *(len(m.lam) for m in matrices.values()))
    tensors = {
        f"{PREFIX}{name}.{key}": array
        for name, matrix in matrices.items()
        for key, array in _factors(matrix.live()).items()
    }
    saved = saved_to_torch(adapters, names)
    tensors |= {f"{PREFIX}{name}": array for name, array in saved.items()}
    same = most == config.init_r and config.lora_alpha > 0
    same = same and config.lora_alpha / config.init_r == scale
    kept = {name: getattr(config, name) for name in _KEPT}
    pattern = None
    if masks is not None or any(len(m.lam) < most or not m.mask.all() for m in matrices.values()):
        pattern = _written_pattern(matrices, places, config, most)
    alpha = config.lora_alpha if same else scale * most
    written = AdaLoraConfig(
        **kept | {"init_r": most, "lora_alpha": alpha},
        target_modules=tuple(matrices),
        modules_to_save=_modules(saved) or None,
        rank_pattern=pattern,
        fan_in_fan_out=_conv1d(matrices, config, names),
    ).to_peft()
    write_adapter(directory, written | _about(base_model, task_type, saved), tensors)


def load_pretrained(
    directory: str | os.PathLike[str],
    *,
    names: Any = None,
    like: Any = None,
) -> Loaded:
    """Reads an AdaLoRA adapter that PEFT wrote, finished or in training, or a plain LoRA adapter.

    It computes what PEFT computes after ``from_pretrained`` of the same files. All numbers come as
    they are, but in two cases λ is made: with ``lora_alpha <= 0`` PEFT's scale follows the rank
    that was left, ``r / init_r``, and λ is multiplied by that; a LoRA adapter gets its
    ``lora_alpha / r`` as λ, and a config without a schedule of its own.

    The files may come from a stranger: nothing in them is executed, and everything is checked.

    Args:
      directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      names: as in :func:`save_pretrained`.
      like: adapters of the Flax model (arrays, or shapes from ``jax.eval_shape``), where the names
        alone do not tell whether layers are stacked or a projection is divided. Ranks may differ.
        From it each adapter knows its weight. Without it that is not known, since an AdaLoRA file
        does not tell a convolution from a linear layer: such an adapter is refused for a
        convolution, and cannot be merged into a square weight.

    Returns:
      A :class:`Loaded`. The layers of a stack are filled up to the largest rank among them; those
      triplets are zero and masked.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged, or malicious, or does not fit ``like``; or it is a pickle.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from adalora_jax import Adapter
    >>> adapter = Adapter(jnp.ones((2, 4, 6)), jnp.ones((2, 4)), jnp.ones((2, 4, 5)))
    >>> config = AdaLoraConfig(total_step=10, init_r=4, target_r=2)
    >>> names = [("layers/query[{i}]", "model.layers.{i}.query")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(folder, {"layers/query": adapter}, config, names=names)
    ...     stacked = load_pretrained(folder, names=names)
    ...     apart = load_pretrained(folder)  # as a model without nn.scan has them
    >>> stacked.adapters["layers/query"].p.shape
    (2, 4, 6)
    >>> list(apart.adapters), apart.adapters["model/layers/0/query"].p.shape
    (['model/layers/0/query', 'model/layers/1/query'], (4, 6))
    """
    names = as_names(names)
    file = read_adapter(directory)
    try:
        kernels = {
            place.path: size
            for name, size in file.kernels.items()
            for place, _ in names.to_flax(name)[:1]
        }
        scale = file.config.scaling
        adapters, masks = from_matrices(file.matrices, names, like, kernels, scale)
        saved = saved_from_torch(file.saved, names, like)
        pattern = _read_pattern(file, masks, names)
    except ValueError as error:
        raise ValueError(f"{os.fspath(directory)}: {error}") from None
    dtypes = {str(leaf.dtype) for adapter in adapters.values() for leaf in adapter}
    config = file.config.replace(
        target_modules=tuple(adapters),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=tuple(saved) or None,
        rank_pattern=pattern,
        param_dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
    )
    return Loaded({**adapters, **saved}, config, masks)


def save_as_lora(
    directory: str | os.PathLike[str],
    adapters: Mapping[str, Any],
    config: AdaLoraConfig,
    *,
    masks: Any = None,
    names: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes a plain LoRA adapter that computes the same, for PEFT and for serving engines.

    λ and the scale go into B, computed in float32 and rounded once to its dtype. Every module has
    the rank that training left it (``rank_pattern``); modules of rank 0 are left out. alpha is
    written equal to the rank, for each module, so that engines which know one ``lora_alpha / r``
    for all modules compute the same as PEFT.

    Args:
      directory, adapters, config, masks, names, base_model, task_type: as in
        :func:`save_pretrained`.

    Raises:
      ValueError: as there; or no triplet is left, or a product is not finite in its dtype.

    >>> import json, pathlib, tempfile
    >>> import jax.numpy as jnp
    >>> from adalora_jax import Adapter
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)), scale=2.0)
    >>> config = AdaLoraConfig(total_step=10, init_r=4, target_r=2, target_modules=["query"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_as_lora(folder, {"encoder/query": adapter}, config)
    ...     written = json.loads(pathlib.Path(folder, "adapter_config.json").read_text())
    >>> written["r"], written["lora_alpha"], written["target_modules"]
    (4, 4, ['encoder.query'])
    """
    _warn_unfinished(masks)
    names = as_names(names)
    scale = common_scale(adapters, config.scaling)
    pattern = None if masks is None else rank_pattern(masks)
    matrices, places = to_matrices(adapters, scale, pattern, names)
    matrices = {name: m.live() for name, m in matrices.items() if m.mask.any()}
    if not matrices:
        raise ValueError("no triplet is left in any adapter: there is nothing to write.")
    tensors, found = {}, pytree.adapters(adapters)
    for name, matrix in matrices.items():
        a, b = _folded(matrix, scale, name)
        if size := kernel_size(found[places[name].path]):
            a, b = a.reshape(len(a), -1, *size), b.reshape(*b.shape, *[1] * len(size))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b
    saved = saved_to_torch(adapters, names)
    tensors |= {f"{PREFIX}{name}": array for name, array in saved.items()}
    ranks = {name: len(matrix.lam) for name, matrix in matrices.items()}
    most = max(ranks.values())
    others = {name for name, rank in ranks.items() if rank != most}
    # PEFT takes the first key that ends a name, so a longer name comes first, and cannot be left
    # out where a shorter one would be taken for it.
    others |= {name for name in ranks if any(name.endswith(f".{other}") for other in others)}
    others = {name: ranks[name] for name in sorted(others, key=lambda n: (-len(n), n))}
    settings = {
        "peft_type": "LORA",
        "r": most,
        "lora_alpha": most,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(matrices),
        "modules_to_save": _modules(saved) or None,
        "lora_dropout": config.lora_dropout,
        "fan_in_fan_out": _conv1d(matrices, config, names),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    write_adapter(directory, settings | _about(base_model, task_type, saved), tensors)


def _warn_unfinished(masks: Any) -> None:
    """Warn where the masks are not the final ones of their run."""
    if masks is not None and (reason := unfinished(masks)):
        warnings.warn(f"{reason}: finish(opt_state, params) makes it.", stacklevel=3)


def _factors(matrix: Matrix) -> dict[str, np.ndarray]:
    return {"lora_A": matrix.q, "lora_B": matrix.p.T, "lora_E": matrix.lam[:, None]}


def _folded(matrix: Matrix, scale: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B of plain LoRA, without a scale."""
    wide = np.promote_types(matrix.p.dtype, np.float32)
    c = matrix.lam.astype(wide) * wide.type(scale)
    with np.errstate(over="ignore"):
        b = (matrix.p.astype(wide) * c[:, None]).astype(matrix.p.dtype).T
    if not np.isfinite(b.astype(wide)).all():
        raise ValueError(
            f"{name!r}: the product of λ, the scale and p is not finite in {matrix.p.dtype}: "
            "convert the adapters to float32, or check them."
        )
    return matrix.q, b


def _written_pattern(
    matrices: Mapping[str, Matrix], places: Mapping[str, Place], config: AdaLoraConfig, length: int
) -> dict[str, list[bool]]:
    """``{module: which of so many triplets are written}``.

    Of an adapter that was cut already, the config may know which rows it once had.
    """
    known = dict(config.rank_pattern or ())
    result = {}
    for name, matrix in matrices.items():
        place, mask = places[name], matrix.mask
        result[name] = [*mask.tolist(), *[False] * (length - len(mask))]
        keep: Any = known.get(place.path)
        for number in place.at:
            keep = keep[number] if isinstance(keep, tuple) and number < len(keep) else None
        booleans = isinstance(keep, tuple) and all(isinstance(entry, bool) for entry in keep)
        if booleans and len(keep) == length and mask.all() and mask.size == sum(keep):
            result[name] = list(keep)
    return result


def _read_pattern(
    file: AdapterFile, masks: Mapping[str, np.ndarray], names: NameMap
) -> dict[str, list] | None:
    """``rank_pattern`` with Flax paths: the file's own where each matrix is one module's."""
    full = file.config.init_r
    if not file.patterns and all(m.all() and m.shape[-1] == full for m in masks.values()):
        return None
    result = {}
    for path, mask in masks.items():
        kept = np.zeros((*mask.shape[:-1], full), bool)
        exact = True
        for index in np.ndindex(mask.shape[:-1]):
            (name, *parts), *more = names.to_hf(path, index)
            keep = file.patterns.get(name, [False] * full)
            exact &= not more and parts == [(0, 1), (0, 1)] and sum(keep) == mask[index].sum()
            kept[index] = keep
        # An empty list would not say that it is one of booleans.
        result[path] = (kept if exact else mask if mask.shape[-1] else kept & False).tolist()
    return result


def _modules(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that the parameters belong to."""
    return tuple(sorted({name.rpartition(".")[0] for name in parameters}))


def _conv1d(matrices: Mapping[str, Matrix], config: AdaLoraConfig, names: NameMap) -> bool:
    return config.fan_in_fan_out or any(map(names.is_conv1d, matrices))


def _about(
    base_model: str | None, task_type: str | None, saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Where the adapter belongs, for its config."""
    if task_type not in (None, *_TASKS):
        raise ValueError(f"task_type={task_type!r} is none of PEFT's: {', '.join(_TASKS)}.")
    if task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and not saved:
        raise ValueError(
            f"task_type={task_type!r}: with it PEFT looks for the classifier in the file, but "
            "there are only adapters: pass its parameters along with them, or no task_type."
        )
    return {
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "inference_mode": True,
    }
