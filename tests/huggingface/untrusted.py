"""A valid adapter to damage, and the checks of files that are loaded or raise."""

import json
import struct
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from adalora_jax import huggingface as peft
from adalora_jax._src import tensorfile

CONFIG = {
    "peft_type": "ADALORA",
    "total_step": 10,
    "init_r": 3,
    "target_r": 1,
    "lora_alpha": 4,
    "target_modules": ["a.query"],
    "rank_pattern": {"a.query.lora_E": [True, False, True]},
}
KEY = "base_model.model.a.query"
TENSORS = {
    f"{KEY}.lora_A": np.arange(8, dtype=np.float32).reshape(2, 4),
    f"{KEY}.lora_B": np.arange(10, dtype=ml_dtypes.bfloat16).reshape(5, 2),
    f"{KEY}.lora_E": np.ones((2, 1), np.float16),
    "base_model.model.head.weight": np.ones((3, 4), np.float32),
}
VALID = safetensors.numpy.save(TENSORS, metadata={"format": "pt"})


def file_of(header, data=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write(folder, config=CONFIG, weights=VALID):
    Path(folder).mkdir(exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (Path(folder) / "adapter_config.json").write_bytes(text)
    (Path(folder) / "adapter_model.safetensors").write_bytes(weights)
    return folder


def attempt(folder):
    """Load an adapter; return None if a short error names the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unknown keys
        try:
            return peft.load_pretrained(folder)
        except (ValueError, FileNotFoundError) as error:
            message = str(error)
    assert str(folder) in message
    assert len(message) < 2500
    return None


def read_here(data, path):
    path.write_bytes(data)
    try:
        with tensorfile.TensorFile(path) as file:
            known = [n for n, spec in file.specs.items() if spec.dtype in tensorfile.FLOATS]
            return {name: file.read(name) for name in known}
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    return None


def judge(data, path):
    """Read a file; check that ``safetensors`` accepts all files that we do, with equal contents."""
    mine = read_here(data, path)
    if mine is not None:
        with safetensors.safe_open(path, "np") as file:
            assert set(mine) <= set(file.keys())
            for name, array in mine.items():
                theirs = file.get_tensor(name)
                assert (array.dtype, array.shape) == (theirs.dtype, theirs.shape)
                assert array.tobytes() == theirs.tobytes()
    return mine
