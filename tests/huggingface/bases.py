"""A base checkpoint, adapters for it, and the merged weights by NumPy."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import adalora_jax as adalora
from adalora_jax import huggingface as peft

CONFIG = adalora.AdaLoraConfig(total_step=9, init_r=3, target_r=1, lora_alpha=6)
RNG = np.random.default_rng(0)
ADAPTERS = {
    path: adalora.Adapter(
        *(jnp.asarray(RNG.normal(size=s), jnp.float32) for s in shapes), scale=CONFIG.scaling
    )
    for path, shapes in {
        "model/up": ((3, 6), (3,), (3, 5)),
        "model/down": ((3, 5), (3,), (3, 6)),
        "model/conv": ((3, 4), (3,), (3, 18)),
    }.items()
}
CONV = adalora.Layout("kernel", (0, 1, 2), (3,), kind="conv", shape=(3, 3, 2, 4))
ADAPTERS["model/conv"] = ADAPTERS["model/conv"]._replace(layout=CONV)
MASKS = {path: np.array([True, False, True]) for path in ADAPTERS}
OPTIONS = {"config": CONFIG, "masks": MASKS}
WEIGHTS = {
    "model.up.weight": RNG.normal(size=(6, 5)).astype(np.float32),
    "model.down.weight": RNG.normal(size=(5, 6)).astype(ml_dtypes.bfloat16),
    "model.conv.weight": RNG.normal(size=(4, 2, 3, 3)).astype(np.float16),
    "model.up.bias": RNG.normal(size=6).astype(np.float32),
    "model.steps": np.arange(3),
}
SHARDS = {"a.safetensors": ["model.up.weight", "model.steps"], "b.safetensors": []}
SHARDS["b.safetensors"] = [name for name in WEIGHTS if name not in SHARDS["a.safetensors"]]


def make_base(folder, sharded=False, weights=WEIGHTS):
    folder.mkdir(parents=True)
    if sharded:
        for file, names in SHARDS.items():
            save_file({n: weights[n] for n in names}, folder / file, {"format": "pt"})
        places = {name: file for file, names in SHARDS.items() for name in names}
        index = {"metadata": {"total_size": 1, "by": "test"}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt", "by": "test"})
    (folder / "config.json").write_text('{"model_type": "own"}')
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab.txt").write_text("words")
    for name in ("pytorch_model.bin", "flax_model.msgpack", ".hidden", "other.safetensors"):
        (folder / name).write_text("not to be copied")
    return folder


def read_all(folder):
    result = {}
    for path in sorted(folder.glob("*.safetensors")):
        result |= load_file(path)
    return result


def expected(name):
    """Compute ``W + s pᵀ diag(λ) q`` over the active rows."""
    path = name.removesuffix(".weight").replace(".", "/")
    p, lam, q = (np.asarray(leaf)[[0, 2]] for leaf in ADAPTERS[path])
    delta = 2.0 * (p.T * lam) @ q
    if path == "model/conv":
        delta = delta.reshape(4, 3, 3, 2).transpose(0, 3, 1, 2)
    return (WEIGHTS[name].astype(np.float32) + delta).astype(WEIGHTS[name].dtype)


def refused(error, match, tmp_path, base, adapters=ADAPTERS, **options):
    """Check that merging raises this error and writes nothing."""
    with pytest.raises(error, match=match):
        peft.merge_pretrained(adapters, base, tmp_path / "out", **OPTIONS | options)
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*"))
