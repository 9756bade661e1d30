"""The files of a base checkpoint: one or several, and an index that may be wrong or malicious."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import hf_numpy
from support.hf_flax import Llama

from adalora_jax import huggingface as peft
from huggingface.bases import ADAPTERS, OPTIONS, WEIGHTS, expected, make_base, read_all, refused
from huggingface.checkpoints import IDS, SIZES, abstract, close, write

pytestmark = pytest.mark.usefixtures("flax_ranks")


def test_single_file_loads_by_its_path(tmp_path):
    tensors = hf_numpy.llama_tensors(SIZES)
    write(tmp_path, tensors)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp32.safetensors")
    model, seen = Llama(SIZES), []
    variables = peft.load_base(
        tmp_path / "model.fp32.safetensors",
        model,
        abstract(model),
        names="llama",
        progress=lambda paths: (seen.append(path) or path for path in paths),
    )
    assert len(seen) == len(jax.tree.leaves(variables)) == len(tensors)
    close(model.apply(variables, IDS), hf_numpy.llama(tensors, SIZES, IDS))


@pytest.mark.parametrize("prefix", ["", "outer.model."])
def test_checkpoint_may_have_another_name_prefix(prefix, tmp_path):
    weights = {name.replace("model.", prefix): value for name, value in WEIGHTS.items()}
    base = make_base(tmp_path / "base", weights=weights)
    peft.merge_pretrained(ADAPTERS, base, tmp_path / "out", **OPTIONS)
    merged = read_all(tmp_path / "out")[f"{prefix}up.weight"]
    np.testing.assert_allclose(merged, expected("model.up.weight"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../secret.safetensors", "not the name"),
        ("/etc/secret.safetensors", "not the name"),
        ("sub/../../secret.safetensors", "not the name"),
        ("C:\\secret.safetensors", "not the name"),
        ("link.safetensors", "outside of its folder"),
        ("folder/a.safetensors", "outside of its folder"),
        ("gone.safetensors", "does not exist"),
        ("pytorch_model.bin", "not a safetensors file"),
        (7, "not a safetensors file"),
        (None, "not a safetensors file"),
    ],
)
def test_index_with_invalid_file_name_raises(name, says, tmp_path):
    base = make_base(tmp_path / "base", sharded=True)
    save_file(WEIGHTS, tmp_path / "secret.safetensors")
    (base / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (tmp_path / "elsewhere").mkdir()
    save_file(WEIGHTS, tmp_path / "elsewhere" / "a.safetensors")
    (base / "folder").symlink_to(tmp_path / "elsewhere")
    index = base / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.up.bias"] = name
    index.write_text(json.dumps(content))
    refused((ValueError, FileNotFoundError), says, tmp_path, base)


@pytest.mark.parametrize(
    "text", ["{}", '{"weight_map": []}', "[", '{"weight_map": {"x": "a.safetensors"}}']
)
def test_index_that_does_not_describe_its_files_raises(text, tmp_path):
    base = make_base(tmp_path / "base", sharded=True)
    (base / "model.safetensors.index.json").write_text(text)
    refused(ValueError, r"index\.json", tmp_path, base)
