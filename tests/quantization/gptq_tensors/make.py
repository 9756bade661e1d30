"""Quantise layers with GPTQModel and record the packed tensors, for ``test_gptq.py``.

GPTQModel needs PyTorch; a CPU is enough. Where it is installed::

    python tests/quantization/gptq_tensors/make.py

Writes ``packed.npz``: per case the tensors of the checkpoint, with the zero points of both formats,
and the weight ``[in, out]`` as GPTQModel itself dequantises it.
"""

from __future__ import annotations

import itertools
import pathlib

import numpy as np

IN, OUT, GROUP = 64, 16, 32


def main() -> None:
    import gptqmodel
    import torch

    torch.manual_seed(0)
    result = {"about": f"gptqmodel {gptqmodel.__version__}, torch {torch.__version__}"}
    for bits, sym, act_order in itertools.product((4, 8), (True, False), (True, False)):
        case = f"{bits}-{'sym' if sym else 'asym'}-{'act' if act_order else 'plain'}"
        for name, tensor in quantised(bits, sym, act_order).items():
            result[f"{case}/{name}"] = tensor.detach().numpy()
    np.savez_compressed(pathlib.Path(__file__).parent / "packed.npz", **result)


def quantised(bits: int, sym: bool, act_order: bool):
    """Quantise a random linear layer by GPTQ on random inputs, and pack it."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    layer = torch.nn.Linear(IN, OUT)
    # Zero points at both ends of the range, where subtracting one borrows from the neighbour.
    layer.weight.data[::5] = layer.weight.data[::5].abs()
    layer.weight.data[1::5] = -layer.weight.data[1::5].abs()
    config = QuantizeConfig(bits=bits, group_size=GROUP, sym=sym, desc_act=act_order)
    task = GPTQ(layer, config)
    task.quantizer.configure(perchannel=True)
    inputs = torch.randn(256, IN) * torch.linspace(0.1, 3, IN)[torch.randperm(IN)]
    task.add_batch(inputs, layer(inputs))
    weight, scales, zeros, groups = task.quantize()[:4]
    rounded = torch.nn.Linear(IN, OUT)
    rounded.weight.data, rounded.bias.data = weight.float(), layer.bias.data
    packed = TorchLinear(bits, GROUP, sym, act_order, IN, OUT, bias=True)
    packed.pack_original(rounded, scales, zeros, groups.to(torch.int32))
    packed.post_init()
    tensors = {"dense": packed.dequantize_weight().clone(), "qzeros_v2": packed.qzeros.clone()}
    convert_gptq_v2_to_v1_format_module(packed, config)
    names = ("qweight", "scales", "g_idx", "bias")
    return {**tensors, "qzeros": packed.qzeros, **{name: getattr(packed, name) for name in names}}


if __name__ == "__main__":
    main()
