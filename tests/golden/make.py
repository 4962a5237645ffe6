"""Makes a reference case with the Python package, or recomputes one that exists.

    python3 -m venv target/peer && target/peer/bin/pip install mblm==0.4.2 torch==2.9.1 safetensors
    target/peer/bin/python tests/golden/make.py tests/golden/NAME.yaml

NAME.yaml is a decoder's model configuration without an LSTM, which the package does not have; `mamba2` blocks are those
of mamba2.py, and `patching` is that of patches.py. Writes NAME.safetensors (README.md lists its tensors). If that file
exists, this takes its parameters and inputs, recomputes everything else, and prints the largest difference of each tensor.
"""

import math
import os
import sys

import patches
import torch
import yaml
from mamba2 import replace_stages
from mblm import MBLM, MBLMModelConfig, MBLMReturnType
from safetensors.torch import load_file, save_file

path = sys.argv[1]
file = os.path.splitext(path)[0] + ".safetensors"
with open(path) as text:
    raw = yaml.safe_load(text)
config = MBLMModelConfig.model_validate(raw)
torch.manual_seed(0)
torch.set_num_threads(1)
model = patches.Patched(config, raw["patching"]) if "patching" in raw else MBLM(config)
replace_stages(model, raw)
context = math.prod(config.seq_lens)
if "patching" in raw:
    patches.check_full_patches(model)
length = context - 3  # not a multiple of the patch length, so that padding is tested


def bytes_(*shape):
    return torch.randint(0, 256, shape)


def batch(rows):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=config.pad_token_id)


if os.path.exists(file):
    old = load_file(file)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(old[f"param.{name}"])
    case = {name: value for name, value in old.items() if name.startswith(("param.", "in.", "train.batches"))}
    shown = (len(old["out.greedy"]), len(old["out.greedy_from_empty"]))
elif "patching" in raw:
    old = None
    ids = batch([patches.tokens(row) for row in patches.ROWS])
    case = {f"param.{name}": value.detach().clone() for name, value in model.named_parameters()}
    case |= {"in.input_ids": ids, "in.loss_mask": torch.rand(ids.shape).round(decimals=1)}
    case |= {"in.prime": ids[0, :26].clone(), "train.batches": batch(patches.parts(40)).reshape(20, 2, -1)}
    shown = (46, 12)
else:
    old = None
    ids, mask = bytes_(2, length), torch.rand(2, length)
    ids[-1, -3:] = config.pad_token_id
    mask[:, : length // 3] = 0
    case = {f"param.{name}": value.detach().clone() for name, value in model.named_parameters()}
    case |= {"in.input_ids": ids, "in.loss_mask": mask, "in.prime": bytes_(context // 2 - 2)}
    case |= {"train.batches": bytes_(20, 2, length)}
    shown = (context, context // 2)

# The hidden state of the package lacks a position, so it is taken from the input of the last layer.
inputs, to_logits = [], model.to_logits.forward
model.to_logits.forward = lambda hidden: inputs.append(hidden.detach()) or to_logits(hidden)
ids = case["in.input_ids"]
loss, logits = model(ids, return_type=MBLMReturnType.LOSS_LOGITS)
loss.backward()
if "patching" in raw:
    hidden = model(ids, return_type=MBLMReturnType.HIDDEN_STATE).detach()
else:
    hidden = inputs[0][..., 1:, :].reshape(ids.shape[0], -1, inputs[0].shape[-1])
case |= {"out.loss": loss.detach(), "out.logits": logits.detach().contiguous()}
case["out.hidden_state"] = hidden[:, : ids.shape[1]].contiguous()
case |= {f"grad.{name}": value.grad.clone() for name, value in model.named_parameters()}
with torch.no_grad():
    case["out.masked_loss"] = model(ids, return_type=MBLMReturnType.LOSS, loss_mask=case["in.loss_mask"].clone())
    case["out.empty_logits"] = model(ids[:, :0], return_type=MBLMReturnType.LOGITS)


def greedy(prime, count):
    made = model.generate(prime, num_tokens_to_generate=count, filter_thres=1.0, enable_progress=False)
    return torch.cat((prime, made.flatten()[-count:].cpu()))


prime = case["in.prime"]
case["out.greedy"] = greedy(prime, shown[0] - len(prime))
case["out.greedy_from_empty"] = greedy(prime[:0], shown[1])

optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
losses, norms = [], []
for batch in case["train.batches"]:
    optimizer.zero_grad()
    loss = model(batch, return_type=MBLMReturnType.LOSS)
    loss.backward()
    losses.append(loss.detach())
    norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    optimizer.step()
case |= {"train.losses": torch.stack(losses), "train.grad_norms": torch.stack(norms)}

if old is None:
    save_file({name: value.contiguous() for name, value in case.items()}, file)
    print(f"wrote {file}: {len(case)} tensors")
else:
    for name in sorted(old):
        if not name.startswith(("param.", "in.", "info.", "train.batches")):
            off = (case[name] - old[name]).abs()
            print(f"{off[~old[name].isnan()].max().item():9.2e}  {name}")
