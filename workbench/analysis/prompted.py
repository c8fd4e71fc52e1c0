"""Predictions of a model after a prompt that contains a hidden state of another text."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from workbench.model.load import Model
from workbench.model.prompted_run import continue_prompted, run_prompted
from workbench.sites.grammar import Site


@dataclass(frozen=True)
class Prompted:
    """A prompt, given as embeddings, whose last position at a site takes a hidden state."""

    model: Model
    site: Site
    prompt: Float[Tensor, "prompt d_embed"]

    def teacher_forced(
        self, states: Float[Tensor, "row d_model"], following: Int[Tensor, "row ahead"], k: int
    ) -> Int[Tensor, "row horizon k"]:
        """Returns the top k tokens after the prompt and after each of the `following` tokens."""
        return run_prompted(self.model, self.site, self.prompt, states, following).topk(k, dim=-1).indices.cpu()

    def free_running(self, states: Float[Tensor, "row d_model"], horizons: int, k: int) -> Int[Tensor, "row horizon k"]:
        """Returns the top k tokens after the prompt and after each of the model's own top tokens."""
        return continue_prompted(self.model, self.site, self.prompt, states, k, horizons)
