"""Passes of one model at the same time: each gets its own activations, and nobody's own pass is disturbed."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workbench.model.capture import capture
from workbench.model.discovery import find_sites
from workbench.model.unembed import measure_unembed

KINDS = ("pattern", "z", "resid_post", "attn_received", "logits")


@pytest.fixture(params=["sdpa", "eager"])
def model(request, tiny_models):
    module = copy.deepcopy(tiny_models["llama"])
    module.set_attn_implementation(request.param)
    return module, find_sites(module)


def batch(seed: int) -> torch.Tensor:
    return torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(seed))


def captured(module, sites, ids, kinds=KINDS) -> dict[str, torch.Tensor]:
    parts: dict[str, list[torch.Tensor]] = {}
    chosen = sites.select(kinds)
    capture(
        module, chosen, ids, torch.ones_like(ids), lambda s, x, _first: parts.setdefault(s.name, []).append(x.clone())
    )
    return {name: torch.cat(blocks, dim=1) for name, blocks in parts.items()}


def equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_threads_that_capture_and_threads_that_run_the_model_do_not_meet(model):
    module, sites = model
    alone = [captured(module, sites, batch(seed)) for seed in range(4)]
    with torch.no_grad():
        answers = [module(batch(seed)).logits for seed in range(4)]

    def capture_often(seed: int) -> bool:
        return all(equal_tensors(captured(module, sites, batch(seed)), alone[seed]) for _ in range(6))

    @torch.no_grad()
    def run_often(seed: int) -> bool:
        return all(torch.equal(module(batch(seed)).logits, answers[seed]) for _ in range(12))

    def measure(_seed: int) -> bool:
        return torch.equal(measure_unembed(module, sites.last_block).weight, module.lm_head.weight)

    with ThreadPoolExecutor(8) as pool:
        tasks = [pool.submit(task, seed) for seed in range(4) for task in (capture_often, run_often)]
        tasks.append(pool.submit(measure, 0))
        assert all(task.result() for task in tasks)
    assert vars(ALL_ATTENTION_FUNCTIONS).keys() == {"_local_mapping"}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_pass_in_another_thread_at_the_same_moment_is_left_alone(model):
    """The other thread's pass runs as a whole while the first one stands still inside of a block."""
    module, sites = model
    alone, entered, ended = captured(module, sites, batch(0)), Event(), Event()
    first = [True]

    def wait(_module, _arguments, _output) -> None:
        if first and first.pop():
            entered.set()
            assert ended.wait(60)

    handle = module.model.layers[0].register_forward_hook(wait)
    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        task = pool.submit(captured, module, sites, batch(0))
        assert entered.wait(60)
        module(batch(1))
        ended.set()
        assert equal_tensors(task.result(), alone)
    handle.remove()


@pytest.mark.parametrize("inside", [lambda module: module, lambda module: module.model])
def test_a_pass_that_a_hook_starts_is_not_the_one_that_is_captured(model, inside):
    module, sites = model
    alone, busy = captured(module, sites, batch(0)), []

    def run_again(_module, _arguments, _output) -> None:
        if not busy:
            busy.append(True)
            inside(module)(batch(1))
            busy.pop()

    handle = module.model.layers[0].register_forward_hook(run_again)
    assert equal_tensors(captured(module, sites, batch(0)), alone)
    assert equal_tensors(
        captured(module, sites, batch(0), kinds=("resid_post.2",)),
        {name: tensor for name, tensor in alone.items() if name == "blocks.2.hook_resid_post"},
    )
    handle.remove()


def test_a_model_in_training_mode_stays_in_it_and_runs_without_dropout(tiny_models):
    module = copy.deepcopy(tiny_models["gpt2"]).train()
    sites = find_sites(module)
    alone = captured(module, sites, batch(0), ("resid_post",))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: captured(module, sites, batch(0), ("resid_post",)), range(16)))
    assert all(equal_tensors(result, alone) for result in results)
    assert all(part.training for part in module.modules())
