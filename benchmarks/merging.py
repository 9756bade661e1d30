"""Rounding errors of an increment that is merged into weights of a narrow dtype.

    python benchmarks/merging.py

The weight W is 1024 x 1024 with the standard deviation of an initialised layer; the increment ΔW
has rank 8 and various norms. Merging rounds W + ΔW to the dtype of W. The benchmark measures the
error relative to the increment, the error of the layer's output, and the error of the weight after
unmerging. The table is written to ``merging.md`` and the numbers to ``merging.json``, in this
folder. Takes seconds.
"""

import jax
import numpy as np
import timing

import adalora_jax as adalora

SIZE, RANK, TOKENS = 1024, 8, 512
DTYPES = ("float32", "bfloat16", "float16")
RATIOS = (1e-3, 1e-2, 1e-1, 1.0)  # norm of the increment to norm of the weight
CONFIG = adalora.AdaLoraConfig(
    total_step=10, init_r=RANK, target_r=RANK, lora_alpha=RANK, init_lora_weights=False
)


def wide(x):
    return np.asarray(x, np.float64)


def measure(dtype, ratio, seed=0):
    """Return relative errors of the increment, the output, and the weight after unmerging."""
    keys = jax.random.split(jax.random.key(seed), 3)
    weight = (jax.random.normal(keys[0], (SIZE, SIZE)) / SIZE**0.5).astype(dtype)
    x = wide(jax.random.normal(keys[1], (TOKENS, SIZE)))
    adapter = adalora.init_adapter(keys[2], SIZE, SIZE, CONFIG)
    size = np.linalg.norm(wide(adalora.delta_weight(adapter)))
    adapter = adapter._replace(lam=adapter.lam * (ratio * np.linalg.norm(wide(weight)) / size))
    p, lam, q = map(wide, adapter)
    delta = q.T * lam @ p
    exact = wide(weight) + delta

    variables = {"params": {"layer": {"kernel": weight}}}
    merged = adalora.merge(variables, {"layer": adapter})
    back = adalora.unmerge(merged, {"layer": adapter})
    kernel = lambda tree: wide(tree["params"]["layer"]["kernel"])
    return {
        "dtype": dtype,
        "increment to weight": ratio,
        "error of the increment": float(
            np.linalg.norm(kernel(merged) - exact) / np.linalg.norm(delta)
        ),
        "error of the output": float(
            np.linalg.norm(x @ (kernel(merged) - exact)) / np.linalg.norm(x @ exact)
        ),
        "error of the weight after unmerging": float(
            np.linalg.norm(kernel(back) - wide(weight)) / np.linalg.norm(wide(weight))
        ),
    }


def main():
    rows = [measure(dtype, ratio) for dtype in DTYPES for ratio in RATIOS]
    show = lambda value: value if isinstance(value, str) else f"{value:.1e}"
    table = [rows[0].keys(), *([show(value) for value in row.values()] for row in rows)]
    timing.save(__file__, {"size": SIZE, "rank": RANK, "rows": rows}, timing.markdown(table))


if __name__ == "__main__":
    main()
