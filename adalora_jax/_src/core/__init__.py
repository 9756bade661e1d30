"""AdaLoRA on JAX and optax alone."""
