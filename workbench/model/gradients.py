"""Gradients of a number that a forward pass gives, with respect to the activations at sites.

One pass and its backward pass: the parameters need no gradient, so that nothing is kept for theirs, and the graph
begins at the input of the first block that has a site. The gradient of a site is that of the model's own tensor, over
all paths on which the model uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.io.errors import DataError, RequestError, WorkbenchError, first_line
from workbench.io.torch_state import plain_torch
from workbench.model.capture import Receive, in_site_shape, read_tensors
from workbench.model.forward import change_tensor, run, the_tensor
from workbench.model.load import Model
from workbench.model.offload import placeholders
from workbench.sites.grammar import Site

_PARTS = ("in", "out", "query", "key", "value", "output", "logits")


def check_gradients(model: Model, sites: Sequence[Site]) -> None:
    """Refuses a model through which no exact gradient flows, and sites that have none.

    Raises:
        RequestError: Quantised, offloaded or float16 weights, or a site that is computed beside the model's own pass.
    """
    module = model.module
    method = getattr(getattr(module, "hf_quantizer", None), "quantization_config", None)
    if method is not None or getattr(module, "is_quantized", False):
        raise RequestError(
            f"gradients: model {model.name!r} is quantised, and the backward pass of its kernels is not exact; load it "
            "without quantisation"
        )
    if placeholders(module):
        raise RequestError(
            f"gradients: weights of model {model.name!r} are offloaded, and are gone in the backward pass; load it on "
            "one device, for example device='cpu'"
        )
    if model.dtype == torch.float16:
        raise RequestError(
            f"gradients: model {model.name!r} computes in float16, which loses gradients below 6e-8; load it with "
            "dtype='float32' or 'bfloat16'"
        )
    for site in sites:
        if site.of or site.tap.part not in _PARTS:
            raise RequestError(
                f"gradients: {site.short or site.name} is computed beside the model's own pass and has no gradient; "
                "leave it out of sites, or record it into another store"
            )


@plain_torch()
def capture_gradients(
    model: Model,
    sites: Sequence[Site],
    ids: Int[Tensor, "batch position"],
    mask: Int[Tensor, "batch position"],
    metric: Callable[[Float[Tensor, "batch position vocab"]], Float[Tensor, ""]],
    *,
    receive: Receive,
    receive_gradient: Receive,
) -> float:
    """Runs the model forward and backward; passes activations and the metric's gradients of each site on.

    Memory: the graph from the first site's block on, about 13 values of d_model a token and block in a Llama (0.9 MB a
    token in SmolLM2-135M in float32), and one gradient at a time. All hooks are removed afterwards, and parameters are
    as before.

    Args:
        model: A causal LM; see `check_gradients`.
        sites: Sites of its site map, which are tensors of the pass itself.
        ids: Token ids.
        mask: 1 for tokens, 0 for padding.
        metric: Returns a number from the logits, a sum over sequences.
        receive: Called with a site and its activations, in the order of the forward pass.
        receive_gradient: Called with a site and its gradient, in the order of the backward pass.

    Returns:
        The metric.

    Raises:
        RequestError: The model computes without gradients, or a part of it has no backward pass.
        DataError: No gradient reaches a site, or a site does not come exactly once.
    """
    backward = _Backward(model, sites, ids.shape, receive, receive_gradient)
    with ExitStack() as stack:
        stack.enter_context(without_weight_gradients(model.module))
        backward.hook(stack)
        try:
            logits = the_tensor(run(model.module, ids, mask, gradients=True).logits)
            backward.see_logits(logits)
            total = metric(logits)
            backward.run(total)
        except (torch.OutOfMemoryError, WorkbenchError):
            raise
        except RuntimeError as error:
            raise RequestError(
                f"gradients: model {model.name!r} has no backward pass ({first_line(error)}); load it with "
                "attn_implementation='sdpa' or 'eager', without compiled or quantised parts"
            ) from error
    return float(total.detach())


class _Backward:
    """One forward and backward pass: where the graph begins, and the sites whose values or gradients are awaited."""

    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        batch: tuple[int, ...],
        receive: Receive,
        receive_gradient: Receive,
    ) -> None:
        self.model, self.sites, self.batch = model, sites, batch
        self.receive, self.receive_gradient = receive, receive_gradient
        self.roots: list[Tensor] = []
        self.waiting = {site.name for site in sites}
        self.silent = {site.name for site in sites}
        """Sites whose gradient has not come."""

    def hook(self, stack: ExitStack) -> None:
        """Hooks the beginning of the graph and all sites but the logits, until `stack` closes."""
        module = self.model.module
        layers = [site.layer for site in self.sites if site.layer is not None]
        if layers:
            first = module.get_submodule(f"{self.model.site_map.blocks}.{min(layers)}")
            stack.enter_context(change_tensor(first, "in", self._begin))
        for site in self.sites:
            if site.layer is None and site.tap.part in ("in", "out"):  # it may lie before every block that is hooked
                place = module.get_submodule(site.tap.path)
                stack.enter_context(change_tensor(place, site.tap.part, self._begin))
        inside = [site for site in self.sites if site.tap.part != "logits"]
        stack.enter_context(read_tensors(module, inside, self.see))

    def _begin(self, tensor: Tensor) -> Tensor:
        """A tensor that has no gradient yet, as the beginning of the graph."""
        if tensor.requires_grad:
            return tensor
        root = tensor.detach().requires_grad_()
        self.roots.append(root)
        return root.clone()  # a model may change its input in place, which a leaf refuses

    def see(self, site: Site, tensor: Tensor | None, heads_first: bool) -> None:
        """Passes a site's tensor on, and awaits its gradient."""
        if site.name not in self.waiting or tensor is None:
            raise DataError(f"site {site.short or site.name}: it ran twice, or without a tensor, in one forward pass")
        self.waiting.remove(site.name)
        self.receive(site, self._rows(site, tensor, heads_first), 0)
        if not tensor.requires_grad:
            raise RequestError(
                f"gradients: model {self.model.name!r} computes {site.short or site.name} without gradients "
                "(torch.no_grad or a detached tensor); leave the site out"
            )
        # of the value as it is now, also if the model changes the tensor in place later
        tensor.register_hook(lambda gradient: self._come(site, gradient, heads_first))

    def _come(self, site: Site, gradient: Tensor, heads_first: bool) -> None:
        if site.name in self.silent:
            self.silent.remove(site.name)
            self.receive_gradient(site, self._rows(site, gradient, heads_first), 0)

    def _rows(self, site: Site, tensor: Tensor, heads_first: bool) -> Tensor:
        tensor = tensor.detach()
        return in_site_shape(site, tensor.transpose(1, 2) if heads_first else tensor, self.batch)

    def see_logits(self, logits: Tensor) -> None:
        """Refuses a pass without gradients, and sees the logits if they are a site."""
        for site in self.sites:
            if site.tap.part == "logits":
                if not logits.requires_grad:
                    self.roots.append(logits.requires_grad_())
                self.see(site, logits, False)
        if not logits.requires_grad:
            raise RequestError(
                f"gradients: model {self.model.name!r} computes its logits without gradients (torch.no_grad); give a "
                "module whose forward pass has gradients"
            )
        if self.waiting:
            missing = ", ".join(sorted(self.waiting))
            raise DataError(f"sites {missing} did not come up in a forward pass of {type(self.model.module).__name__}")

    def run(self, total: Float[Tensor, ""]) -> None:
        """Runs the backward pass."""
        torch.autograd.grad(total, self.roots, allow_unused=True)
        if self.silent:
            raise DataError(
                f"gradients: none of the metric reaches {', '.join(sorted(self.silent))}: nothing behind it uses it; "
                "leave the site out"
            )


@contextmanager
def without_weight_gradients(module: nn.Module) -> Iterator[None]:
    """Parameters need no gradient inside the block: nothing is kept in memory for theirs."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
