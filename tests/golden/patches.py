"""Patches whose ends follow the content: the field `patching` of a case's configuration, for make.py.

A rule names the bytes after which a patch ends. Every patch is padded to its full length; what is computed on these ids is
the package's own `forward`.
"""

import math

import torch
import torch.nn.functional as F
from mblm import MBLM, MBLMReturnType


def is_spacelike(token):
    return token < 128 and not chr(token).isalnum() or 192 <= token < 256


def spacelike(row, at):
    """SpaceByte (arXiv 2404.14408, section 3): after the first of a run of spacelike bytes."""
    return is_spacelike(row[at]) and not (at > 0 and is_spacelike(row[at - 1]))


def fixed(row, at):
    return False


def delimiters(ends):
    return lambda row, at: row[at] in set(ends.encode())


def rules(patching, stages):
    """One rule per level of patches, from the outside in; levels without one are `fixed`."""
    named = {"fixed": fixed, "spacelike": spacelike}
    entries = patching if isinstance(patching, list) else [patching]
    given = [named[entry] if isinstance(entry, str) else delimiters(entry["bytes"]) for entry in entries]
    return [fixed] * (stages - 1 - len(given)) + given


class Patched(MBLM):
    """The package's model, for ids (B, L) whose rows may end in padding."""

    def __init__(self, config, patching):
        super().__init__(config)
        self.rules = rules(patching, len(config.seq_lens))

    def places(self, row):
        """Of every byte of a sequence: its global patch, the patch in that patch, and so on down to the place in its patch."""
        place, places = [0] * self.num_stages, []
        for at in range(len(row)):
            places.append(tuple(place))
            place[-1] += 1
            for level in range(self.num_stages - 1, 0, -1):
                # Where a patch ends, all patches in it end.
                if place[level] == self.seq_lens[level] or any(ends(row, at) for ends in self.rules[:level]):
                    place[level] = 0
                    place[level - 1] += 1
        return places

    def lay_out(self, ids):
        """(B, L) to (B, P_1', P_2, ..., P_N), with padding at the right of every patch."""
        rows = [[token for token in row if token != self.pad_token_id] for row in ids.tolist()]
        places = [self.places(row) for row in rows]
        patches = 1 + max(row[-1][0] for row in places)
        laid_out = torch.full((len(rows), patches, *self.seq_lens[1:]), self.pad_token_id)
        for patched, row, at in zip(laid_out, rows, places):
            patched[tuple(zip(*at))] = torch.tensor(row)
        return laid_out

    def forward(self, input_ids, return_type=MBLMReturnType.LOSS, loss_mask=None):
        if input_ids.numel() == 0:
            return super().forward(input_ids, return_type=return_type)
        real, laid_out = input_ids != self.pad_token_id, self.lay_out(input_ids)
        hidden = return_type == MBLMReturnType.HIDDEN_STATE
        at_places = super().forward(laid_out, return_type=return_type if hidden else MBLMReturnType.LOGITS)
        at_bytes = at_places if hidden else at_places[..., 1:, :]  # without the start token of each patch
        out = at_bytes.new_full((*input_ids.shape, at_bytes.shape[-1]), torch.nan)  # where there is no byte
        out[real] = at_bytes[laid_out != self.pad_token_id]
        if return_type in (MBLMReturnType.HIDDEN_STATE, MBLMReturnType.LOGITS):
            return out

        # A byte is predicted where the byte before it is, the first one at the first start token.
        first = at_places[(slice(None),) + (0,) * self.num_stages]
        predictions = torch.cat((first[:, None], out[:, :-1]), dim=1)
        losses = F.cross_entropy(predictions[real], input_ids[real], reduction="none")
        losses = losses if loss_mask is None else losses * loss_mask[real]
        loss = losses[losses != 0].mean()
        return loss if return_type == MBLMReturnType.LOSS else (loss, out)


def check_full_patches(model):
    """Where nothing but its length ends a patch, loss and logits are those of the package."""
    ids = torch.randint(0, 256, (2, math.prod(model.seq_lens) - 1))
    has, model.rules = model.rules, [delimiters("")] * (model.num_stages - 1)
    full = model(ids, return_type=MBLMReturnType.LOSS_LOGITS)
    package = MBLM.forward(model, ids, return_type=MBLMReturnType.LOSS_LOGITS)
    model.rules = has
    assert all(ours.equal(theirs) for ours, theirs in zip(full, package))


# `~` stands for the special token 257, which is not a byte.
ROWS = [
    "Zürich,   88.17 km²\n\nis ~ deep: 136 m.\n",
    "Incomprehensibilities — 日本語 2024\n",
    "a\n b? ok ",
]


def tokens(text):
    return torch.tensor([257 if byte == ord("~") else byte for byte in text.encode()])


def parts(count):
    """Parts of the text, of different lengths."""
    text = tokens("".join(ROWS))
    lengths = torch.randint(12, 33, (count,)).tolist()
    starts = [int(torch.randint(0, len(text) - length, ())) for length in lengths]
    return [text[start : start + length] for start, length in zip(starts, lengths)]
