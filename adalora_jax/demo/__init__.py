"""Demo of the library on real data, in less than a minute: ``python -m adalora_jax.demo``.

A small Vision Transformer is pre-trained on the handwritten digits 0-4. It is then adapted to the
digits 5-9 by four methods, on the same batches: training the classifier alone, LoRA, AdaLoRA, and
full fine-tuning. To learn the library, read these files in this order:

===============  =======================================================================
``in_linen.py``  the model and the train step in ``flax.linen``
``in_nnx.py``    the same in ``flax.nnx``
``methods.py``   the four methods, each an optimizer and a config
``train.py``     the training loop and the measurements
``data.py``      the digits
``__main__.py``  the command line
===============  =======================================================================
"""
