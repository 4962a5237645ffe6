"""What the float32 of a reference case is off by: the case `mm_m2_3d`, computed again in float64.

    target/peer/bin/python tests/golden/float64.py     (the environment of make.py)

The package's own modules compute everything but the Mamba-2 stage, which it does not have on a CPU: that is a plain loop over
positions here. Prints, for the gradients that differ most, the largest difference relative to the tensor's largest element.
"""

import os

import torch
import torch.nn.functional as F
import yaml
from mblm import MBLM, MBLMModelConfig, MBLMReturnType
from safetensors.torch import load_file
from torch import nn

case = os.path.join(os.path.dirname(__file__), "mm_m2_3d")
with open(case + ".yaml") as text:
    raw = yaml.safe_load(text)
mamba2 = raw["block"][2]
raw["block"][2] = raw["block"][1] | {"pos_emb_type": None}  # a stand-in, replaced below
known = load_file(case + ".safetensors")


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Mixer(nn.Module):
    def __init__(self, dim, d_state, d_conv, expand, headdim):
        super().__init__()
        self.inner, self.d_state, self.heads = dim * expand, d_state, dim * expand // headdim
        conv = self.inner + 2 * d_state
        self.in_proj = nn.Linear(dim, self.inner + conv + self.heads, bias=False)
        self.conv1d = nn.Conv1d(conv, conv, d_conv, groups=conv, padding=d_conv - 1)
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.zeros(self.heads)) for _ in range(3))
        self.norm = Norm(self.inner)
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def forward(self, x):
        batch, seq, _ = x.shape
        z, xbc, dt = self.in_proj(x).split([self.inner, self.inner + 2 * self.d_state, self.heads], -1)
        xbc = F.silu(self.conv1d(xbc.transpose(1, 2))[..., :seq].transpose(1, 2))
        u, b, c = xbc.split([self.inner, self.d_state, self.d_state], -1)
        delta, u = F.softplus(dt + self.dt_bias), u.reshape(batch, seq, self.heads, -1)
        decay = torch.exp(-delta * self.A_log.exp())
        h, ys = u.new_zeros(batch, self.heads, u.shape[-1], self.d_state), []
        for t in range(seq):
            new = (delta[:, t, :, None] * u[:, t])[..., None] * b[:, t, None, None, :]
            h = decay[:, t, :, None, None] * h + new
            ys.append((h * c[:, t, None, None, :]).sum(-1))
        y = torch.stack(ys, 1) + self.D[:, None] * u
        return self.out_proj(self.norm(y.reshape(batch, seq, -1) * F.silu(z)))


class Layer(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.norm, self.mixer = Norm(sizes[0]), Mixer(*sizes)

    def forward(self, x):
        return x + self.mixer(self.norm(x))


class Stack(nn.Module):
    def __init__(self, layers, *sizes):
        super().__init__()
        self.layers, self.norm_f = nn.ModuleList(Layer(*sizes) for _ in range(layers)), Norm(sizes[0])

    def forward(self, x, *_, **__):
        for layer in self.layers:
            x = layer(x)
        return self.norm_f(x)


model = MBLM(MBLMModelConfig.model_validate(raw))
sizes = [mamba2[field] for field in ("d_state", "d_conv", "expand", "headdim")]
model.stage_models[2] = Stack(raw["num_layers"][2], raw["hidden_dims"][2], *sizes)
model = model.double()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        parameter.copy_(known["param." + name])
torch.Tensor.float = torch.Tensor.double  # modules that ask for float32 get float64
loss = model(known["in.input_ids"], return_type=MBLMReturnType.LOSS)
loss.backward()

print(f"loss {loss.item():.9f}, in float32 {known['out.loss'].item():.9f}")
grads = {name: (known["grad." + name].double(), parameter.grad) for name, parameter in model.named_parameters()}
off = {name: ((have - want).abs().max() / want.abs().max()).item() for name, (have, want) in grads.items()}
for name in sorted(off, key=off.get, reverse=True)[:5]:
    print(f"{off[name]:.4e}  {name}")
