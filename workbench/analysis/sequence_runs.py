"""Runs of the model over sequences of a store, changed or not: activations of a site, and losses of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from workbench.io.torch_state import plain_torch
from workbench.model.capture import capture
from workbench.model.forward import run
from workbench.model.intervene import Intervention, intervene
from workbench.model.load import Model, batch_tokens
from workbench.store.reader import Store

_LOGIT_BYTES = 128 << 20  # float32 logits of one batch


@dataclass(frozen=True)
class SequenceRuns:
    """Sequences of token ids, right-padded, and the model that runs on them."""

    model: Model
    ids: Int64[Tensor, "sequence position"]
    mask: Int64[Tensor, "sequence position"]

    @classmethod
    def make(
        cls, model: Model, store: Store, starts: Int[np.ndarray, " sequence"], lengths: Int[np.ndarray, " sequence"]
    ) -> SequenceRuns:
        """Returns the runs over sequences of a store, which begin at the rows `starts`."""
        known = store.tokens["token_id"].to_numpy()
        return cls.of(model, [known[start : start + n] for start, n in zip(starts, lengths, strict=True)])

    @classmethod
    def of(cls, model: Model, sequences: Sequence[Sequence[int] | Int[np.ndarray, " _"]]) -> SequenceRuns:
        """Returns the runs over sequences of token ids."""
        shape = (len(sequences), max(map(len, sequences)))
        ids, mask = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(2))
        for number, one in enumerate(sequences):
            ids[number, : len(one)] = torch.as_tensor(np.asarray(one, np.int64))
            mask[number, : len(one)] = 1
        return cls(model, ids, mask)

    @property
    def targets(self) -> Int[np.ndarray, " sequence"]:
        """Number of predicted tokens of each sequence: all but its first."""
        return (self.mask.sum(1) - 1).clamp(min=0).numpy()

    def batches(self) -> Iterator[slice]:
        """Yields slices of the sequences whose passes fit the default batch and whose logits take 128 MiB."""
        tokens = min(batch_tokens(self.model), _LOGIT_BYTES // (4 * self.model.vocab))
        step = max(1, tokens // self.ids.shape[1])
        return (slice(first, min(first + step, len(self.ids))) for first in range(0, len(self.ids), step))

    @plain_torch()
    def values(self, site: str) -> Float[Tensor, "sequence position ..."]:
        """Returns the activations of a site, in the model's type, on the CPU; 0 at padding."""
        known, kept = self.model.site_map.select([site]), []
        for part in self.batches():
            ids, mask = self.ids[part], self.mask[part]
            capture(
                self.model.module, known, ids, mask, lambda _site, tensor, _first: kept.append(tensor.detach().cpu())
            )
        values = torch.cat(kept)
        return torch.where(self.mask.bool().reshape(*self.mask.shape, *[1] * (values.ndim - 2)), values, 0)

    @plain_torch()
    def losses(
        self, records: Callable[[slice], Sequence[Intervention]] = lambda _part: ()
    ) -> Float64[np.ndarray, " sequence"]:
        """Returns the cross-entropy of the next token in nats, summed over each sequence, under interventions.

        Args:
            records: Returns the interventions of a slice of the sequences; none: the unchanged model.
        """
        sums = []
        for part in self.batches():
            changes = records(part)
            with intervene(self.model, *changes) if changes else nullcontext():
                logits = run(self.model.module, self.ids[part], self.mask[part]).logits
            log = logits[:, :-1].float().log_softmax(-1)
            target = self.ids[part][:, 1:, None].to(log.device)
            loss = -log.gather(-1, target)[..., 0].double().cpu()
            sums.append(torch.where(self.mask[part][:, 1:].bool(), loss, 0).sum(1))
        return torch.cat(sums).numpy()
