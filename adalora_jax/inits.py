"""Initial values that depend on the model: on its weights, or on the inputs of its layers.

:func:`pissa_init` starts adapters as the top singular vectors of their weights (`PiSSA
<https://arxiv.org/abs/2404.02948>`_). :func:`eva_init` starts them along the directions in which
the layers' inputs vary most, and :func:`eva_ranks` sets initial ranks by the explained variance
(`EVA <https://arxiv.org/abs/2410.07170>`_); both take the second moments from
:func:`input_second_moments`.
"""

from adalora_jax._src.modules.data_init import eva_init, eva_ranks, input_second_moments, pissa_init

__all__ = [
    "eva_init",
    "eva_ranks",
    "input_second_moments",
    "pissa_init",
]
