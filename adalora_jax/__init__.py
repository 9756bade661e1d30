"""AdaLoRA for JAX: adapters ``ΔW = P Λ Q`` for any model, with ranks allocated in training.

`AdaLoRA <https://arxiv.org/abs/2303.10512>`_ writes the increment of a weight as a sum of triplets
``(p_i, λ_i, q_i)``. During training it scores all triplets of a model, and sets λ of those with the
lowest scores to 0 until a budget is met. Each layer is left with its own rank.

The steps of a run, and their functions:

=============================================  =================================================
:class:`AdaLoraConfig`                         set the hyper-parameters
:func:`linen.adapt`, :func:`nnx.adapt`         add adapters to a Flax model
:func:`functional.adapt`                       add adapters to a function of parameters
:func:`adalora`                                wrap an optax optimizer: its updates allocate ranks
:func:`orthogonality`                          the penalty to add to the loss
:func:`info`, :func:`ranks`, :func:`summary`   monitor the allocation
:func:`finish`                                 make the final mask if it is missing
:func:`eval_params`                            apply the masks, for evaluation and export
:func:`compact`                                remove the pruned triplets
:func:`merge`                                  add the increments to the base model's weights
=============================================  =================================================

Submodules:

===================================  ===========================================================
``linen``, ``nnx``                   adapters for the two Flax APIs
``functional``                       adapters for functions of parameters (plain JAX, Equinox)
``scores``                           building blocks of scores
``inits``                            initial values from the model's weights or inputs
``protocols``                        signatures of the functions that a config accepts
``bank``                             several adapters of one model
``sharding``                         shardings of adapters and optimizer states on a mesh
``checkpoint``                       orbax checkpoints
``huggingface``                      files of Hugging Face PEFT and base models (reading them needs
                                     safetensors)
``quantization``, ``qwix_models``    quantised base models (need qwix)
``plot``                             figures of a run (needs matplotlib)
===================================  ===========================================================
"""

import importlib as _importlib
import importlib.util as _util
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING as _TYPE_CHECKING

from adalora_jax import functional, linen, nnx, scores, sharding
from adalora_jax._src.core.adapter import Adapter, delta_weight, forward
from adalora_jax._src.core.allocator import (
    AdaLoraState,
    AllocatorState,
    allocate,
    allocator_state,
    init_state,
)
from adalora_jax._src.core.bank import AdapterBank, per_example
from adalora_jax._src.core.compaction import summary
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.evaluation import eval_params, masks, rank_pattern, ranks
from adalora_jax._src.core.init import init_adapter
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.monitor import AllocatorInfo, info
from adalora_jax._src.core.pytree import adapters, param_labels
from adalora_jax._src.core.rank_spec import RankSpec
from adalora_jax._src.core.regularizer import orthogonality
from adalora_jax._src.core.schedule import budget
from adalora_jax._src.core.stacking import StackedAdapters, stack, unstack
from adalora_jax._src.core.transform import AdaLoraOptState, adalora
from adalora_jax._src.modules import serialization as _serialization  # noqa: F401  (registers)
from adalora_jax._src.modules.merging import compact, finish, merge, unmerge
from adalora_jax._src.version import __version__ as __version__

__all__ = [
    "AdaLoraConfig",
    "AdaLoraOptState",
    "AdaLoraState",
    "Adapter",
    "AdapterBank",
    "AllocatorInfo",
    "AllocatorState",
    "Layout",
    "RankSpec",
    "StackedAdapters",
    "adalora",
    "adapters",
    "allocate",
    "allocator_state",
    "budget",
    "compact",
    "delta_weight",
    "eval_params",
    "finish",
    "forward",
    "functional",
    "info",
    "init_adapter",
    "init_state",
    "linen",
    "masks",
    "merge",
    "nnx",
    "orthogonality",
    "param_labels",
    "per_example",
    "rank_pattern",
    "ranks",
    "scores",
    "sharding",
    "stack",
    "summary",
    "unmerge",
    "unstack",
]

# Imported when they are first asked for, with the package that they need and its extra.
_LAZY = {
    "checkpoint": None,
    "huggingface": None,
    "inits": None,
    "plot": ("matplotlib", "plot"),
    "protocols": None,
    "quantization": ("qwix", "quant"),
    "qwix_models": ("qwix", "quant"),
}

if _TYPE_CHECKING:
    from adalora_jax import checkpoint as checkpoint
    from adalora_jax import huggingface as huggingface
    from adalora_jax import inits as inits
    from adalora_jax import plot as plot
    from adalora_jax import protocols as protocols
    from adalora_jax import quantization as quantization
    from adalora_jax import qwix_models as qwix_models
else:

    def __getattr__(name: str) -> _ModuleType:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        package, extra = _LAZY[name] or ("", "")
        try:
            return _importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if not package or error.name != package:
                raise
            raise ModuleNotFoundError(
                f"`{__name__}.{name}`: needs {package}, which is not installed; pip install "
                f'"adalora-jax[{extra}]".',
                name=package,
            ) from error

    def __dir__() -> list[str]:
        def is_installed(needed: tuple[str, str] | None) -> bool:
            return needed is None or _util.find_spec(needed[0]) is not None

        return sorted({*__all__, *(name for name, needed in _LAZY.items() if is_installed(needed))})
