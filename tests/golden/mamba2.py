"""Mamba-2 as a plain loop over positions: the package has none on a CPU. Parameters are named as in the package."""

import torch
import torch.nn.functional as F
from torch import nn


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
        self.A_log, self.D, self.dt_bias = (nn.Parameter(torch.randn(self.heads)) for _ in range(3))
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


def replace_stages(model, raw):
    """Puts this in place of the stages whose block in `raw`, the model's configuration, is `mamba2`."""
    blocks = raw["block"] if isinstance(raw["block"], list) else [raw["block"]] * len(raw["hidden_dims"])
    for stage, block in enumerate(blocks):
        if block["block_type"] == "mamba2":
            sizes = [block[field] for field in ("d_state", "d_conv", "expand", "headdim")]
            model.stage_models[stage] = Stack(raw["num_layers"][stage], raw["hidden_dims"][stage], *sizes)
