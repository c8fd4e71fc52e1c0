"""Record that gives the model other token embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.io.errors import RequestError, shown
from workbench.io.torch_state import plain_torch
from workbench.model.forward import change_tensor
from workbench.model.intervene import Bound, CurrentTokens, Intervention
from workbench.model.load import Model
from workbench.model.positions import PassTokens
from workbench.model.token_choice import At, Tokens, tokens_at, whole


@dataclass(frozen=True, eq=False)
class EmbedTokens(Intervention):
    """Sets the output of the embedding module at the chosen tokens, before position embeddings are added.

    The weights stay as they are, so an unembedding that shares them is untouched. Give either `ids` or `vectors`.
    """

    at: At
    """Tokens that it changes."""
    ids: int | Sequence[int] | None = None
    """Token ids whose embeddings are set: one for all, or one for each position that `at` names."""
    vectors: Float[Tensor, "... d_embed"] | None = field(default=None, kw_only=True)
    """Vectors that are set, in the scale of the module's output: one for all, axes (d_embed), or one for each position
    from 0 on, axes (position, d_embed)."""

    def bind(self, model: Model) -> Bound:
        """Returns the record made ready for one model; see `Intervention.bind`."""
        return _BoundEmbedding(self, model)

    def __str__(self) -> str:
        return "embed tokens" if self.ids is None else f"embed tokens {self.ids}"


class _BoundEmbedding(Bound):
    """Other outputs of a model's embedding module."""

    def __init__(self, record: EmbedTokens, model: Model) -> None:
        super().__init__(record, "embedding")
        self.at = tokens_at(record.at)
        if (record.ids is None) == (record.vectors is None):
            raise RequestError("EmbedTokens takes either ids or vectors")
        if record.vectors is None:
            self._vectors, self._per = _embedded(model, record, self.at)
            return
        vectors = torch.as_tensor(record.vectors)
        width = token_embeddings(model, torch.zeros(1, dtype=torch.long)).shape[1]
        if vectors.ndim not in (1, 2) or vectors.shape[-1] != width or not vectors.is_floating_point():
            raise RequestError(f"vectors has the shape {tuple(vectors.shape)}; give vectors of width {width}")
        if not bool(vectors.detach().isfinite().all()):
            raise RequestError("vectors has a value that is not finite")
        self._vectors, self._per = vectors, "position" if vectors.ndim == 2 else "all"

    def attach(self, module: nn.Module, tokens: CurrentTokens, stack: ExitStack) -> None:
        """Registers the hook; see `Bound.attach`."""
        part = module.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        stack.enter_context(change_tensor(part, "out", lambda tensor: self._apply(tensor, tokens.of(self.record))))

    def _apply(self, tensor: Tensor, present: PassTokens) -> Tensor:
        mask = present.chosen(self.at)
        self.count.passes += 1
        self.seen |= present.came_up(self.at)
        if not bool(mask.any()):
            return tensor
        sequence, column = mask.nonzero().unbind(1)
        rows = tensor.reshape(mask.numel(), tensor.shape[-1])
        index = (sequence * mask.shape[1] + column).to(rows.device)
        new = self._vectors.to(rows).expand(len(index), -1) if self._per == "all" else self._of_each(present, mask)
        new = new.to(rows)
        fresh = (column >= present.fresh).to(rows.device)
        self.count.add(rows[index][fresh], new[fresh])
        return rows.index_copy(0, index, new).reshape(tensor.shape)

    def _of_each(self, present: PassTokens, mask: Tensor) -> Tensor:
        position = present.named(self.at)[mask] if self._per == "named" else present.position_of(mask)
        if len(position) and int(position.max()) >= len(self._vectors):
            raise RequestError(
                f"vectors has {len(self._vectors)} positions, and position {int(position.max())} is chosen"
            )
        return self._vectors[position.to(self._vectors.device)]


def _embedded(model: Model, record: EmbedTokens, at: Tokens | Tensor) -> tuple[Tensor, str]:
    """Embeddings of the ids, and how they are assigned: one for all tokens, or one for each named position."""
    ids = record.ids if isinstance(record.ids, Sequence) else (record.ids,)
    if isinstance(ids, str) or not all(map(whole, ids)) or not all(0 <= int(id or 0) < model.vocab for id in ids):
        raise RequestError(f"ids must be token ids from 0 to {model.vocab - 1}, not {shown(record.ids)}")
    positions = () if isinstance(at, Tensor) else at.positions
    if isinstance(record.ids, Sequence) and len(ids) != len(positions):
        raise RequestError(f"ids has {len(ids)} ids; give one, or one for each of the {len(positions)} named positions")
    vectors = token_embeddings(model, torch.tensor([int(id or 0) for id in ids]))
    return (vectors, "named") if isinstance(record.ids, Sequence) else (vectors[0], "all")


@plain_torch()
@torch.no_grad()
def token_embeddings(model: Model, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_embed"]:
    """Returns rows of the model's embedding table, scaled if its module scales them, as `EmbedTokens` takes them."""
    return model.module.get_input_embeddings()(ids.to(model.device)).clone()
