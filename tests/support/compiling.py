"""XLA flags that compile the tests quickly, to slower programs that compute the same.

Most of the tests' time is compilation of programs that then run for a millisecond, so optimization
is disabled unless ``XLA_FLAGS`` is set already: ``XLA_FLAGS= python -m pytest`` compiles as users
do, and takes three times as long.

On a GPU, flags make results repeatable, and a test of what only XLA's CPU compiler promises calls
:func:`skip_unless_cpu` or :func:`assert_same`.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

QUICK = {
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    # One module for LLVM: splitting it only pays with many cores.
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
if jax.__version_info__ < (0, 11):  # later versions do not know the flag and fail to start
    # Emit element-wise operations directly instead of lowering them through several dialects.
    QUICK["xla_cpu_use_fusion_emitters"] = (False, True)
# A GPU otherwise chooses kernels by their time, and may add in any order. A CPU ignores both flags.
REPEATABLE = ("--xla_gpu_autotune_level=0", "--xla_gpu_exclude_nondeterministic_ops=true")
FLAGS = " ".join(
    [*(f"--{name}={str(quick).lower()}" for name, (quick, _) in QUICK.items()), *REPEATABLE]
)
# For ``.compile(AS_USERS)``, where a test is about the compiled program itself.
AS_USERS = {name: usual for name, (_, usual) in QUICK.items()}


def environment(devices=1):
    """Return the environment of a subprocess with CPU ``devices`` and the import path of tests."""
    tests = pathlib.Path(__file__).parents[1]
    paths = [str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {os.environ['XLA_FLAGS']}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def skip_unless_cpu(reason):
    """Skip the test, or what follows in it, on another back end than the CPU's."""
    if jax.default_backend() != "cpu":
        pytest.skip(f"for the CPU back end only: {reason}")


def assert_same(ours, wanted):
    """Check that two programs' arrays are equal: on a CPU bit by bit, elsewhere but for rounding.

    On a GPU, the order of a sum may depend on the program around it.
    """
    if jax.default_backend() == "cpu" or not jnp.issubdtype(jnp.result_type(ours), jnp.floating):
        np.testing.assert_array_equal(ours, wanted)
        return
    near = 8 * float(jnp.finfo(ours.dtype).eps)
    ours, wanted = (np.asarray(array, np.float64) for array in (ours, wanted))
    size = np.abs(wanted).max(initial=0)
    np.testing.assert_allclose(ours, wanted, rtol=near, atol=near * size)
