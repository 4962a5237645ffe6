"""Writes the files of this folder with torch 2.9: python tests/pth/make.py"""

import os
from collections import OrderedDict

import numpy as np
import torch
from torch import nn

os.chdir(os.path.dirname(os.path.abspath(__file__)))
torch.manual_seed(0)


class Net(nn.Module):
    """Three floats and two tensors that are none."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

    def forward(self, x):
        return x @ self.w


net = Net()
w = net.w.detach()

torch.save(net.state_dict(), "state_dict.pth")
torch.save({"MODEL": net.state_dict(), "LOSS": torch.tensor(1.5)}, "loss_tensor.pth")
torch.save({"MODEL": net.state_dict(), "LOSS": torch.tensor([1.5], dtype=torch.bfloat16)}, "loss_bf16.pth")
history = {"LOSSES": [np.float32(2.5), np.float64(1.5), np.int64(-3)], "TABLE": np.arange(3.0), "BEST": np.bool_(True)}
torch.save({"MODEL": net.state_dict(), "LOSS": np.float64(1.5), **history}, "loss_numpy.pth")
torch.save({"MODEL": net.state_dict(), "LOSS": np.float32(1.25), **history}, "loss_float32.pth", pickle_protocol=4)
torch.save({"MODEL": net.state_dict(), "LOSS": None}, "loss_none.pth")

# What a trainer may keep beside the model: the optimizer with integers and its own tensors, numbers, text.
optimizer = torch.optim.AdamW(net.parameters())
net(torch.ones(1, 2)).sum().backward()
optimizer.step()
net.w.data.copy_(torch.arange(6.0).reshape(2, 3))
everything = {
    "MODEL": net.state_dict(),
    "LOSS": 1.25,
    "OPTIMIZER": optimizer.state_dict(),
    "EPOCH": 3,
    "RNG": torch.get_rng_state()[:16].clone(),
    "NOTE": "what else there is",
    "DONE": False,
}
torch.save(everything, "beside.pth")

# Windows of storages: a negative view, a transposed one, a slice, two that share a storage, and other types of floats.
big = torch.arange(12.0)
views = OrderedDict(
    negative=torch._neg_view(w),
    negative_slice=torch._neg_view(big)[4:6],
    transposed=w.t(),
    sliced=big.reshape(3, 4)[1:, 1:3],
    shared=big[10:],
    f64=w.double(),
    f16=w.half(),
    bf16=w.bfloat16(),
    parameter=nn.Parameter(w.clone()),
    expanded=torch.full((1,), 0.5).expand(5, 3),
    repeated=w.clone().expand(2, 2, 3),
)
torch.save({"MODEL": views, "LOSS": 1}, "views.pth")

wrapped = OrderedDict((f"module._orig_mod.{name}", value) for name, value in net.state_dict().items())
torch.save({"MODEL": wrapped, "LOSS": 1.0}, "wrapped.pth")

# Tensors whose numbers are no floats, or lie elsewhere than in a storage of floats.
odd = OrderedDict(
    w=w,
    int8=torch.ones(2, dtype=torch.int8),
    uint16=torch.ones(2, dtype=torch.uint16),
    float8=torch.ones(2).to(torch.float8_e4m3fn),
    complex=torch.ones(2, dtype=torch.complex64),
    quantized=torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    sparse=w.to_sparse(),
    csr=w.to_sparse_csr(),
    meta=torch.ones(2, device="meta"),
    nested=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
)
torch.save({"MODEL": odd, "LOSS": 1.0}, "odd.pth")

# What is refused.
torch.save(net, "module.pth")
torch.save(net.state_dict(), "legacy.pth", _use_new_zipfile_serialization=False)
torch.jit.script(net).save("script.pth")
torch.save([w], "list.pth")
