"""Rounding errors of an increment that is merged into weights of a narrow dtype.

    python -m benchmarks.merging

The weight W is 1024 x 1024 with the standard deviation of an initialised layer; the increment ΔW
has rank 8 and various norms. Merging rounds W + ΔW to the dtype of W. The benchmark measures the
error relative to the increment, the error of the layer's output, and the error of the weight after
unmerging. Takes seconds.
"""

import jax
import numpy as np

import adalora_jax as adalora
from benchmarks import results

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

    def kernel(tree):
        return wide(tree["params"]["layer"]["kernel"])

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


def text(found: results.Results) -> str:
    errors = ("increment", "output", "weight after unmerging")
    columns = [f"error of the {error}, parts per million" for error in errors]
    rows = [("dtype", "norm of the increment / norm of the weight", *columns)]
    for row in found["rows"]:
        numbers = [results.number(1e6 * row[f"error of the {error}"]) for error in errors]
        rows.append((row["dtype"], f"{row['increment to weight']:g}", *numbers))
    return "\n\n".join(
        [
            "# Rounding errors of merging",
            "Merging adds the increment ΔW of an adapter to the weight W and rounds the sum to the "
            f"dtype of W. The benchmark merges increments of rank {found['rank']} and of several "
            f"norms into a weight of {found['size']:,} × {found['size']:,}, and compares with "
            "float64.",
            "The error of the increment is the norm of the rounding error divided by the norm of "
            "ΔW: at 1,000,000 parts per million, the increment is lost. The error of the output is "
            "relative to the output of the merged layer. The last column is the difference between "
            "W and the weight after merging and unmerging, relative to W.",
            "The rounding error depends on the weight, and hardly on the increment. A small "
            "increment therefore loses most: in bfloat16, one of a hundredth of the weight's norm "
            "loses a sixth of itself, and one of a thousandth loses most of itself. Serve such an "
            "adapter unmerged, or merge in float32.",
            results.markdown(rows),
            results.ending("merging", found),
        ]
    )


def main() -> None:
    rows = [measure(dtype, ratio) for dtype in DTYPES for ratio in RATIOS]
    results.finish("merging", {"size": SIZE, "rank": RANK, "rows": rows}, text)


if __name__ == "__main__":
    main()
