"""Modules of a model that could be adapted, with the reasons why some of them cannot."""

from __future__ import annotations

from typing import Any, NamedTuple

from adalora_jax._src.core.layout import Layout
from adalora_jax._src.modules.usage import Use

# Prefix of the note of a layer that can be merged only if the outputs are compared.
UNKNOWN_USE = "it is not known how its weight is used, since "


class Candidate(NamedTuple):
    """A module of the model that may be selected.

    Attributes:
      module: the linen or NNX module.
      layer: how its weight is read; None if modules of its kind cannot be adapted.
      shape: shape of the whole weight, stacked axes included.
      cannot_adapt: why this layer cannot be adapted although it has a weight; empty if it can.
      note: why its increment cannot be merged; empty if it can.
      dropout: whether its scope has random numbers for dropout.
      wrapper: the Flax wrapper that normalises its weight, such as ``WeightNorm``; empty if none.
      declaration: an example of the declaration with which it could be adapted; empty if it does
        not have one weight with two or more axes.
    """

    module: Any
    layer: Layout | None = None
    shape: tuple[int, ...] = ()
    cannot_adapt: str = ""
    note: str = ""
    dropout: bool = True
    wrapper: str = ""
    declaration: str = ""


def with_use(candidate: Candidate, use: Use, is_custom_layer: bool) -> Candidate:
    """Return the candidate with ``cannot_adapt`` or ``note`` set by the use of its weight.

    Args:
      candidate: a layer.
      use: how its weight is used.
      is_custom_layer: whether its class does not extend a Flax layer, so that the adapter output
        is added to the output of its whole method.
    """
    if use.untraced:
        return candidate._replace(
            note=f"{UNKNOWN_USE}its class takes other arguments than one input"
        )
    if use.read_outside:
        return candidate._replace(
            cannot_adapt="its weight is also used outside of the layer, where the increment would "
            "be missing, while a merged model has it in both places (use embed.attend for an "
            "embedding that is also the head)"
        )
    if use.transformed:
        return candidate._replace(
            note="its layer transforms the stored weight before it is used, so no sum of weights "
            "computes the same"
        )
    if use.output_transformed and is_custom_layer:
        return candidate._replace(
            note="its layer does more than multiply its input by the weight and add to the "
            "product, so no sum of weights computes the same"
        )
    return candidate
