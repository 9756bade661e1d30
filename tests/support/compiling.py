"""XLA flags that compile the tests quickly, to slower programs that compute the same.

Most of the tests' time is compilation of programs that then run for a millisecond, so optimization
is disabled unless ``XLA_FLAGS`` is set already: ``XLA_FLAGS= python -m pytest`` compiles as users
do, and takes three times as long.
"""

import os
import pathlib

import jax

QUICK = {
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
    # One module for LLVM: splitting it only pays with many cores.
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
if jax.__version_info__ < (0, 11):  # later versions do not know the flag and fail to start
    # Emit element-wise operations directly instead of lowering them through several dialects.
    QUICK["xla_cpu_use_fusion_emitters"] = (False, True)
FLAGS = " ".join(f"--{name}={str(quick).lower()}" for name, (quick, _) in QUICK.items())
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
