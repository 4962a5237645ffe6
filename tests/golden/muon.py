"""Writes muon.json: five steps of torch.optim.Muon for matrices and torch.optim.AdamW for the rest (torch 2.9.1, CPU).

    python tests/golden/muon.py

torch computes Muon's Newton-Schulz iteration in bfloat16. `float32` has the same steps with that one conversion left out
(`Tensor.bfloat16` returns its tensor), so that it can be compared closely; `bfloat16` has them as torch takes them.
"""

import json
import pathlib

import torch

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (6, 6), "bias": (7,)}
STEPS, LR = 5, 0.02
CASES = [
    {"adjust": "match_rms_adamw", "momentum": 0.95, "weight_decay": 0.0},
    {"adjust": "match_rms_adamw", "momentum": 0.95, "weight_decay": 0.1},
    {"adjust": "original", "momentum": 0.8, "weight_decay": 0.1},
]
as_bfloat16 = torch.Tensor.bfloat16

generator = torch.Generator().manual_seed(16)
draw = lambda shape: torch.randn(shape, generator=generator)
start = {name: draw(shape) for name, shape in SHAPES.items()}
# Gradients of common size shrink and grow, as those of training do.
grads = [{name: draw(shape) * scale for name, shape in SHAPES.items()} for scale in (1.0, 0.1, 3.0, 1e-3, 0.5)]
flat = lambda tensors: {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def train(case, convert):
    torch.Tensor.bfloat16 = convert
    params = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    muon = torch.optim.Muon(
        [param for param in params.values() if param.ndim == 2],
        lr=LR,
        weight_decay=case["weight_decay"],
        momentum=case["momentum"],
        adjust_lr_fn=case["adjust"],
    )
    # A bias does not decay.
    adam = torch.optim.AdamW([params["bias"]], lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    for step in grads:
        for name, param in params.items():
            param.grad = step[name].clone()
        muon.step()
        adam.step()
    torch.Tensor.bfloat16 = as_bfloat16
    return flat({name: param.detach() for name, param in params.items()})


cases = [{**case, "float32": train(case, lambda x: x.clone()), "bfloat16": train(case, as_bfloat16)} for case in CASES]
whole = {"lr": LR, "shapes": SHAPES, "start": flat(start), "grads": [flat(step) for step in grads], "cases": cases}
pathlib.Path(__file__).with_name("muon.json").write_text(json.dumps(whole) + "\n")
