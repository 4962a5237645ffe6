"""What the float32 of a reference case is off by: the case `mm_m2_3d`, computed again in float64.

    target/peer/bin/python tests/golden/float64.py     (the environment of make.py)

The package's own modules compute everything but the Mamba-2 stage, which it does not have on a CPU: mamba2.py does. Prints,
for the gradients that differ most, the largest difference relative to the tensor's largest element.
"""

import os

import torch
import yaml
from mamba2 import replace_stages
from mblm import MBLM, MBLMModelConfig, MBLMReturnType
from safetensors.torch import load_file

case = os.path.join(os.path.dirname(__file__), "mm_m2_3d")
with open(case + ".yaml") as text:
    raw = yaml.safe_load(text)
known = load_file(case + ".safetensors")

model = MBLM(MBLMModelConfig.model_validate(raw))
replace_stages(model, raw)
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
