"""Adapters in PEFT's file format: saving, loading, and export as plain LoRA."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from adalora_jax._src.core import pytree
from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.core.evaluation import rank_pattern, unfinished
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.huggingface.files import PREFIX, AdapterFile, read_adapter, write_adapter
from adalora_jax._src.huggingface.matrices import (
    LowRankMatrix,
    common_scale,
    from_matrices,
    kernel_size,
    to_matrices,
)
from adalora_jax._src.huggingface.names import NameMap, Names, ParamLocation, as_names
from adalora_jax._src.huggingface.saved import saved_from_torch, saved_to_torch

# Config fields that PEFT shares and that are written unchanged; layers are listed one by one.
_KEPT = ("total_step", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2")
_KEPT += ("orth_reg_weight", "lora_dropout", "init_lora_weights")
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


class LoadedAdapter(NamedTuple):
    """An adapter loaded from a file, with the paths of the Flax model.

    :func:`load_pretrained` returns it and has an example.

    Attributes:
      adapters: ``{path: Adapter}``, and ``{path: parameters}`` of ``modules_to_save``, in the
        file's dtypes; λ of a LoRA adapter is float32.
      config: the adapter's config with Flax paths, as ``adapt(model, config)`` takes it.
      masks: ``{path: [..., r] booleans}``: True where a triplet is active.
    """

    adapters: dict[str, Any]
    config: AdaLoraConfig
    masks: dict[str, np.ndarray]


def save_pretrained(
    directory: str | os.PathLike[str],
    adapters: Mapping[str, PyTree],
    config: AdaLoraConfig,
    *,
    masks: PyTree = None,
    names: Names = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write an AdaLoRA adapter that ``peft.PeftModel.from_pretrained`` loads.

    The tensors of an increment ``scale · pᵀ diag(λ) q`` (`AdaLoRA, Eq. (3)
    <https://arxiv.org/abs/2303.10512>`_) are ``lora_A = q`` ``[r, in]``, ``lora_B = pᵀ``
    ``[out, r]`` and ``lora_E = λ`` ``[r, 1]``.

    The masks alone determine the written rows, independently of the values of λ: pruned rows are
    removed and recorded in ``rank_pattern``, as in PEFT. All other numbers are written bit for bit,
    in their own dtype. PEFT has one alpha and one init_r for all layers, so if adapters have
    different scales, λ is multiplied by the ratio, and init_r is the largest rank, at least
    ``config.init_r``. Training options that PEFT does not have (score, schedule, ...) are omitted,
    so a run that continues in PEFT follows PEFT's rules. PEFT's scale is
    ``alpha / (init_r + 1e-5)``. If PyTorch computes queries, keys and values in one module, their
    adapters are combined into one with the rows of all three, each zero outside its third. This
    computes the same function, and :func:`load_pretrained` splits it again.

    Args:
      directory: the folder to write; it is created if it does not exist. Existing files are
        replaced in an order such that readers never see a mismatched pair.
      adapters: ``{path: Adapter}`` and the parameters of ``modules_to_save``: the trained
        parameters with the masks applied, see :func:`adalora_jax.eval_params`.
      config: the run's config, for PEFT's config file. The scale is read from the adapters.
      masks: the optimizer's state, or ``{path: [..., r] booleans}`` as in
        :func:`adalora_jax.masks`; without them every triplet is written. A ``UserWarning`` reports
        a state whose final mask is still to come.
      names: the names of the layers in PyTorch: a family such as ``"bert"``, pairs of names, or
        a :class:`~adalora_jax.huggingface.NameMap`. Without it ``/`` becomes ``.``.
      base_model: the base model's name on the Hub, or its path, for the config.
      task_type: PEFT's task type, such as ``"CAUSAL_LM"``. For a classifier's, such as
        ``"SEQ_CLS"``, ``adapters`` must contain the classifier's parameters.

    Raises:
      TypeError: ``config`` is not an :class:`AdaLoraConfig`.
      ValueError: a path has no name in PyTorch, a parameter has no PyTorch form, a mask is missing
        or has another size, or ``task_type`` is not one of PEFT's or lacks the classifier.
      OSError: ``directory`` cannot be written.

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
    names = as_names(names)
    scale, matrices, places = _checked_matrices(adapters, config, masks, names)
    rank = max(config.init_r, *(len(m.lam) for m in matrices.values()))
    tensors = {
        f"{PREFIX}{name}.{key}": array
        for name, matrix in matrices.items()
        for key, array in _factors(matrix.active()).items()
    }
    saved = saved_to_torch(adapters, names)
    tensors |= {f"{PREFIX}{name}": array for name, array in saved.items()}
    same = rank == config.init_r and config.lora_alpha > 0
    same = same and config.lora_alpha / config.init_r == scale
    kept = {name: getattr(config, name) for name in _KEPT}
    pattern = None
    if masks is not None or any(len(m.lam) < rank or not m.mask.all() for m in matrices.values()):
        pattern = _written_pattern(matrices, places, config, rank)
    alpha = config.lora_alpha if same else scale * rank
    written = AdaLoraConfig(
        **kept | {"init_r": rank, "lora_alpha": alpha},
        target_modules=tuple(matrices),
        modules_to_save=_modules(saved) or None,
        rank_pattern=pattern,
        fan_in_fan_out=_conv1d(matrices, config, names),
    ).to_peft()
    write_adapter(directory, written | _about(base_model, task_type, saved), tensors)


def load_pretrained(
    directory: str | os.PathLike[str],
    *,
    names: Names = None,
    like: PyTree = None,
    revision: str | None = None,
) -> LoadedAdapter:
    """Read an AdaLoRA adapter that PEFT wrote, finished or in training, or a plain LoRA adapter.

    The result computes the same function as PEFT after ``from_pretrained`` of the same files.
    Numbers are loaded unchanged, except for λ in two cases: with ``lora_alpha <= 0`` PEFT's scale
    is ``r / init_r`` with the remaining rank ``r``, and λ is multiplied by it; in a LoRA adapter
    every λ is ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``), and the config has
    no schedule.

    The files may be untrusted: they are validated, and no code in them is executed.

    Args:
      directory: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or, where
        no such folder exists and ``huggingface_hub`` is installed, the id of an adapter on the Hub
        as a string, ``"owner/name"``. Only these two files are downloaded, into the Hub's cache.
      names: as in :func:`save_pretrained`.
      like: adapters of the Flax model (arrays, or shapes from ``jax.eval_shape``), for cases where
        the names do not determine whether layers are stacked or a projection is split. Ranks may
        differ. Each adapter takes its :class:`~adalora_jax.Layout` from ``like``. Without ``like``
        the layout is unknown, since an AdaLoRA file does not distinguish a convolution from a
        linear layer: such an adapter raises an error in a convolution, and cannot be merged into a
        square weight.
      revision: branch, tag or commit on the Hub; without it, the main branch. It has no effect on
        a folder.

    Returns:
      A :class:`LoadedAdapter`. The layers of a stack are padded to the largest rank among them with
      triplets that are zero and whose mask is False.

    Raises:
      FileNotFoundError: a file is missing, or cannot be downloaded.
      ValueError: a file is damaged or malicious, does not fit ``like`` or ``names``, uses an
        unsupported option, has float64 numbers while JAX's 64-bit types are disabled, or is a
        pickle.

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
    file = read_adapter(directory, revision)
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
        raise ValueError(f"`{os.fspath(directory)}`: {error}") from None
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
    return LoadedAdapter({**adapters, **saved}, config, masks)


def save_as_lora(
    directory: str | os.PathLike[str],
    adapters: Mapping[str, PyTree],
    config: AdaLoraConfig,
    *,
    masks: PyTree = None,
    names: Names = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Write a plain LoRA adapter that computes the same function, for PEFT and serving engines.

    ``A = q`` ``[r, in]`` and ``B = scale · pᵀ diag(λ)`` ``[out, r]``, so that ``B A`` is the
    increment of `AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_. ``B`` is computed in at
    least float32 and rounded once to the dtype of ``p``. The rank of every module is its number of
    active triplets (``rank_pattern``); modules of rank 0 are omitted. Each module's alpha equals
    its rank, so that engines with a single ``lora_alpha / r`` for all modules compute the same
    function as PEFT.

    Args:
      directory, adapters, config, masks, names, base_model, task_type: as in
        :func:`save_pretrained`.

    Raises:
      TypeError: ``config`` is not an :class:`AdaLoraConfig`.
      ValueError: as in :func:`save_pretrained`; or no triplet is active, or ``B`` is not finite in
        its dtype.
      OSError: ``directory`` cannot be written.

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
    names = as_names(names)
    scale, matrices, places = _checked_matrices(adapters, config, masks, names)
    matrices = {name: m.active() for name, m in matrices.items() if m.mask.any()}
    if not matrices:
        raise ValueError(
            "`adapters`: have no active triplet, so nothing can be written; pass adapters "
            "and masks with at least one."
        )
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
    rank = max(ranks.values())
    others = {name for name, r in ranks.items() if r != rank}
    # PEFT uses the first key that is a suffix of the module's name. Longer names therefore come
    # first, and are listed even at the common rank if a shorter key would match them.
    others |= {name for name in ranks if any(name.endswith(f".{other}") for other in others)}
    others = {name: ranks[name] for name in sorted(others, key=lambda n: (-len(n), n))}
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
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


def _checked_matrices(
    adapters: Mapping[str, PyTree], config: AdaLoraConfig, masks: PyTree, names: NameMap
) -> tuple[float, dict[str, LowRankMatrix], dict[str, ParamLocation]]:
    """Return the common scale, the matrices by their names in PyTorch, and their locations.

    Raises:
      TypeError: ``config`` is not an :class:`AdaLoraConfig`.
      ValueError: an adapter is that of an embedding, or as in :func:`to_matrices`.

    Warns:
      UserWarning: the masks are not the final ones of their run.
    """
    check_config(config)
    if masks is not None and (problem := unfinished(masks)):
        warnings.warn(f"`masks`: {problem}; call finish(opt_state, params) first.", stacklevel=3)
    _check_embeddings(adapters)
    scale = common_scale(adapters, config.scaling)
    pattern = None if masks is None else rank_pattern(masks)
    return scale, *to_matrices(adapters, scale, pattern, names)


def _check_embeddings(adapters: Mapping[str, PyTree]) -> None:
    """Raise an error for adapted embeddings, whose tensors PEFT would ignore with a warning."""
    for path, adapter in pytree.adapters(adapters).items():
        if adapter.layout is not None and adapter.layout.kind == "embed":
            raise ValueError(
                f"`adapters`: {path!r} adapts an embedding, for which PEFT's AdaLoRA has no layer "
                "and PEFT's LoRA has another format; exclude it by exclude_modules, or add the "
                "increments to the base model's files with merge_pretrained(adapters, base, out)."
            )


def _factors(matrix: LowRankMatrix) -> dict[str, np.ndarray]:
    return {"lora_A": matrix.q, "lora_B": matrix.p.T, "lora_E": matrix.lam[:, None]}


def _folded(matrix: LowRankMatrix, scale: float, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of plain LoRA, with λ and the scale multiplied into B."""
    wide = np.promote_types(matrix.p.dtype, np.float32)
    c = matrix.lam.astype(wide) * wide.type(scale)
    with np.errstate(over="ignore"):
        b = (matrix.p.astype(wide) * c[:, None]).astype(matrix.p.dtype).T
    if not np.isfinite(b.astype(wide)).all():
        raise ValueError(
            f"`adapters`: the product of λ, the scale and p of {name!r} is not finite in "
            f"{matrix.p.dtype}; convert the adapters to float32, or check them."
        )
    return matrix.q, b


def _written_pattern(
    matrices: Mapping[str, LowRankMatrix],
    places: Mapping[str, ParamLocation],
    config: AdaLoraConfig,
    length: int,
) -> dict[str, list[bool]]:
    """Return ``{module: length booleans}``, PEFT's ``rank_pattern``: True for written triplets.

    For a compacted adapter, ``config.rank_pattern`` may contain the mask that it was compacted
    with.
    """
    known = dict(config.rank_pattern or ())
    result = {}
    for name, matrix in matrices.items():
        place, mask = places[name], matrix.mask
        result[name] = [*mask.tolist(), *[False] * (length - len(mask))]
        keep: Any = known.get(place.path)
        for number in place.stack_index:
            keep = keep[number] if isinstance(keep, tuple) and number < len(keep) else None
        booleans = isinstance(keep, tuple) and all(isinstance(entry, bool) for entry in keep)
        if booleans and len(keep) == length and mask.all() and mask.size == sum(keep):
            result[name] = list(keep)
    return result


def _read_pattern(
    file: AdapterFile, masks: Mapping[str, np.ndarray], names: NameMap
) -> dict[str, list] | None:
    """Return ``rank_pattern`` with Flax paths, or None if the file prunes no triplet.

    It is the file's pattern where each matrix corresponds to one module, and the mask otherwise.
    """
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
        # A mask of rank 0 is written as booleans of full length, since an empty list has no type.
        result[path] = (kept if exact else mask if mask.shape[-1] else kept & False).tolist()
    return result


def _modules(parameters: Iterable[str]) -> tuple[str, ...]:
    """Return the sorted names of the modules that the parameters belong to."""
    return tuple(sorted({name.rpartition(".")[0] for name in parameters}))


def _conv1d(matrices: Mapping[str, LowRankMatrix], config: AdaLoraConfig, names: NameMap) -> bool:
    return config.fan_in_fan_out or any(map(names.is_conv1d, matrices))


def _about(
    base_model: str | None, task_type: str | None, saved: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return the base model, task type and mode for PEFT's config."""
    if task_type not in (None, *_TASKS):
        raise ValueError(
            f"`task_type={task_type!r}`: must be one of {', '.join(_TASKS)}, or None; use one of "
            "them."
        )
    if task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") and not saved:
        raise ValueError(
            f"`task_type={task_type!r}`: makes PEFT expect the classifier in the file, but "
            "adapters has no other parameters; add the classifier's parameters, or leave task_type "
            "out."
        )
    return {
        "base_model_name_or_path": base_model,
        "task_type": task_type,
        "inference_mode": True,
    }
