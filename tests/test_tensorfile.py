"""Damaged safetensors files raise errors, as in the package ``safetensors``."""

import json
import struct

import pytest
import safetensors
import safetensors.numpy
from huggingface.untrusted import file_of, judge

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": b"",
    "short": b"\x00" * 7,
    "a header beyond the file": struct.pack("<Q", 2**63) + b"{}",
    "a header of a gigabyte": struct.pack("<Q", 2**30) + b"{}",
    "a hole": file_of({"x": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
    "an overlap": file_of({"x": F32, "y": F32}, bytes(8)),
    "data left over": file_of({"x": F32}, bytes(9)),
    "data missing": file_of({"x": F32}, bytes(7)),
    "a huge shape": file_of({"x": {**F32, "shape": [2**39, 2**39]}}, bytes(8)),
    "zero times huge": file_of({"x": {**F32, "shape": [0, 2**62], "data_offsets": [0, 0]}}),
    "a negative size": file_of({"x": {**F32, "shape": [-2]}}, bytes(8)),
    "an unknown dtype": file_of({"x": {**F32, "dtype": "F128"}}, bytes(8)),
    "offsets turned round": file_of({"x": {**F32, "data_offsets": [8, 0]}}, bytes(8)),
    "a float for a size": file_of({"x": {**F32, "shape": [2.0]}}, bytes(8)),
    "a key twice": file_of(b'{"x": %s, "x": %s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
    "a list for an entry": file_of({"x": ["F32", [2], [0, 8]]}, bytes(8)),
    "too many axes": file_of({"x": {**F32, "shape": [1] * 70 + [2]}}, bytes(8)),
    "deep nesting": file_of(b"[" * 100_000),
    "no object": file_of(b"[]"),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}),
    "a pickle": b"\x80\x04\x95" + bytes(100),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_weights_are_rejected_as_by_safetensors(what, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    assert judge(DAMAGED[what], path) is None
    stricter = ("a key twice", "a list for an entry", "too many axes", "zero times huge")
    if what not in stricter:
        with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "np") as file:
            file.keys()
