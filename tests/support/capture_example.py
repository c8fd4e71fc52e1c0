"""A small batch of unequal lengths, and the activations that one pass over it captures."""

import torch

from workbench.model.capture import capture

LENGTHS = (9, 4)
N = max(LENGTHS)


def captured(module, sites, batch):
    """Every site's activations as one tensor, by short name."""
    pieces = {}

    def receive(site, tensor, first):
        assert first == sum(piece.shape[1] for piece in pieces.get(site.short, []))
        pieces.setdefault(site.short, []).append(tensor.clone())

    capture(module, sites, *batch, receive)
    return {short: torch.cat(tensors, dim=1) for short, tensors in pieces.items()}
