"""Parameters of ``modules_to_save`` in PyTorch's form and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adalora_jax import huggingface as peft
from adalora_jax._src.huggingface.names import as_names
from adalora_jax._src.huggingface.saved import saved_from_torch
from huggingface.bases import ADAPTERS, CONFIG, make_base, read_all


def test_saved_parameters_replace_those_of_base(tmp_path):
    base = make_base(tmp_path / "base", sharded=True)
    bias, kernel = jnp.arange(6.0), jnp.arange(12.0).reshape(6, 2)
    trained = {"model/up": ADAPTERS["model/up"], "head": {"kernel": kernel}, "model/up/bias": bias}
    peft.merge_pretrained(trained, base, tmp_path / "out", config=CONFIG)
    merged = read_all(tmp_path / "out")
    np.testing.assert_array_equal(merged["model.up.bias"], bias)
    np.testing.assert_array_equal(merged["head.weight"], kernel.T)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["head.weight"] == "b.safetensors"


@pytest.mark.parametrize(
    ("kind", "leaf", "says"),
    [
        ("pos_embedding", jnp.ones((3, 4)), "cannot be written"),
        ("head/kernel", jnp.ones((3, 2, 4)), "1 stack axes"),
        ("head/kernel", jnp.ones(3), "cannot be written"),
        ("head/w", jnp.ones((3, 4)), "cannot be written"),
    ],
)
def test_parameters_without_pytorch_form_raise(kind, leaf, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        peft.save_pretrained(tmp_path, {"model/up": ADAPTERS["model/up"], kind: leaf}, CONFIG)
    assert not list(tmp_path.iterdir())


def test_tensors_that_do_not_fit_like_raise():
    names, like = as_names(None), {"head": {"kernel": np.ones((3, 2)), "bias": np.ones(2)}}
    tensors = {"head.weight": np.ones((2, 3), np.float32), "head.bias": np.ones(2, np.float32)}
    found = saved_from_torch(tensors, names, like)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, like)
    with pytest.raises(ValueError, match=r"`like\['head/bias'\]`: has no tensor 'head.bias' in"):
        saved_from_torch({"head.weight": tensors["head.weight"]}, names, like)
    with pytest.raises(ValueError, match=r"'head/kernel'\]`: has shape \(3, 2\), but \(2, 3\) in"):
        saved_from_torch(tensors | {"head.weight": np.ones((3, 2), np.float32)}, names, like)
    with pytest.raises(ValueError, match=r"`like`: has no parameter for 'norm.weight'"):
        saved_from_torch(tensors | {"norm.weight": np.ones(2, np.float32)}, names, like)
