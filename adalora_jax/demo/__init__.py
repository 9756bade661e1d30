"""``python -m adalora_jax.demo``: the library at work on real data, in less than a minute.

A small Vision Transformer learns to read the handwritten digits 0-4 and is frozen. It is then
taught the digits 5-9 in four ways, over the same batches: the classifier alone, LoRA, AdaLoRA,
and full fine-tuning. To learn how the library is used, read these files in this order:

==============  ========================================================================
``in_linen.py``  the model and the train step in ``flax.linen``
``in_nnx.py``    the same in ``flax.nnx``
``methods.py``   the four ways, each an optimizer and a config
``train.py``     the loop around the step, and what is measured
``data.py``      the digits
``__main__.py``  the command line
==============  ========================================================================
"""
