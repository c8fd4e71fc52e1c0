"""Random autoencoders of every SAELens architecture, with rows made to go wrong, against SAELens' own `encode`."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from torch import Tensor

from workbench.sae import encode
from workbench.sae.autoencoder import Sae
from workbench.sae.encode import NotFinite, encoder

TRAINING = ("batchtopk", "matryoshka_batchtopk")
"""Architectures of training that encode as their trainer does: the largest of a whole batch."""
WHOLE = ("temporal", "matching_pursuit", *TRAINING)
"""Architectures without a product and a choice for each row."""


@dataclass(frozen=True)
class Case:
    """An autoencoder and rows."""

    architecture: str
    sae: Sae
    rows: Tensor
    whole_numbers: bool
    """All numbers are small and whole: sums are exact in any order."""


def architectures() -> list[str]:
    """Returns the names of all architectures that SAELens encodes with."""
    from sae_lens.registry import SAE_CLASS_REGISTRY

    return [*SAE_CLASS_REGISTRY, *TRAINING]


def random_case(seed: int) -> Case:
    """Returns the autoencoder and the rows of a seed; neighbouring seeds have different architectures."""
    from sae_lens.registry import get_sae_class, get_sae_training_class

    random = np.random.default_rng(seed)
    names = architectures()
    name = names[seed % len(names)]
    d_in, d_sae = 2 * int(random.integers(1, 45)), 2 * int(random.integers(3, 250))
    d_sae += int(name != "temporal" and random.integers(2))
    settings = {"apply_b_dec_to_input": bool(random.integers(2))}
    if name in ("topk", "abstopk", *TRAINING):
        settings |= {"k": int(random.integers(1, max(2, d_sae // 3))), "rescale_acts_by_decoder_norm": seed % 3 == 0}
    if "transcoder" in name:
        settings = {"apply_b_dec_to_input": False, "d_out": d_in}
    if name == "temporal":
        settings = {"n_heads": 2, "bottleneck_factor": 1, "kval_topk": int(random.integers(1, 5))}
    if name == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [max(1, d_sae // 2), d_sae]
    kind, config = (get_sae_training_class if name in TRAINING else get_sae_class)(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        module = kind(config(d_in=d_in, d_sae=d_sae, **settings)).eval().requires_grad_(False)
    whole_numbers = name not in WHOLE and name != "gated" and not settings.get("rescale_acts_by_decoder_norm", False)
    whole_numbers &= bool(random.integers(2))
    for part, parameter in module.named_parameters():
        parameter.copy_(torch.from_numpy(_weights(random, part, tuple(parameter.shape), whole_numbers)))
    rows = torch.from_numpy(_rows(random, d_in, whole_numbers))
    return Case(name, Sae(module, f"seed {seed}"), rows, whole_numbers)


def _weights(random: np.random.Generator, name: str, shape: tuple[int, ...], whole: bool) -> np.ndarray:
    values = random.integers(-2, 3, shape) if whole else random.normal(size=shape)
    if name in ("b_enc", "b_gate"):
        values = values - random.integers(0, 12)
    if name == "threshold":
        values = abs(values) + random.integers(0, 5)
    if name == "r_mag":
        values = values * 0.1
    if name == "W_enc" and not whole:
        if random.integers(2):  # norms of very different size
            values = values * np.exp(random.normal(size=shape[1]) * 2)
        if random.integers(2):  # features that are closer to each other than bfloat16 resolves
            copies = random.integers(shape[1], size=shape[1] // 3)
            values[:, : len(copies)] = values[:, copies] * (1 + 1e-4 * random.normal(size=len(copies)))
    return values.astype(np.float32)


def _rows(random: np.random.Generator, d_in: int, whole: bool) -> np.ndarray:
    if whole:
        return random.integers(-2, 3, (40, d_in)).astype(np.float32)
    rows = random.normal(size=(40, d_in)) + random.integers(0, 3)
    rows[3, 0] *= 1e5  # one far larger dimension
    rows[5] *= 1e-20
    rows[7] *= 1e12
    rows[9] = 0
    rows[11] = rows[10]
    return rows.astype(np.float32)


def check_case(case: Case, patch: pytest.MonkeyPatch) -> None:
    """Asserts that every precision and size of blocks gives SAELens' features, and that bad rows are named."""
    plain = case.sae.encode(case.rows)
    bad = case.rows.clone()
    bad[23, 0] = (torch.nan, torch.inf, -torch.inf)[len(case.rows[0]) % 3]
    for precision in ("float32", "bfloat16"):
        sae_encoder = encoder(case.sae, precision=precision)
        assert (sae_encoder.linear is None) == (case.architecture in WHOLE)
        for room in (40 << 20, 1) if sae_encoder.linear else (40 << 20,):
            with patch.context() as inner:
                inner.setattr(encode, "_BLOCK_BYTES", room)
                inner.setattr(encode, "_LEAST_ROWS", 16)
                _check_same(case, _dense(sae_encoder(case.rows), case.sae.d_sae), plain.numpy())
                with pytest.raises(NotFinite, match=r"^row 23 is not finite$"):
                    sae_encoder(bad)


def _dense(rows, features: int) -> np.ndarray:
    arrays = rows.value.numpy(), rows.feature.numpy(), rows.indptr.numpy()
    matrix = csr_array(arrays, shape=(len(arrays[2]) - 1, features))
    assert matrix.has_canonical_format
    assert (arrays[0] != 0).all()
    return matrix.toarray()


def _check_same(case: Case, encoded: np.ndarray, plain: np.ndarray) -> None:
    top = case.architecture in ("topk", "abstopk")
    if case.architecture == "abstopk":  # either sign of a tie
        encoded, plain = np.abs(encoded), np.abs(plain)
    if case.whole_numbers:
        assert np.array_equal(np.sort(encoded, 1), np.sort(plain, 1)) if top else np.array_equal(encoded, plain)
        return
    scale = _sizes(case)
    if top:  # two pre-activations closer than float32 resolves may rank either way
        assert (np.abs(np.sort(encoded, 1) - np.sort(plain, 1)) <= 1e-5 * scale.max(1, keepdims=True)).all()
        assert ((encoded != 0).sum(1) == (plain != 0).sum(1)).all()
        return
    differing = (encoded != 0) != (plain != 0)
    assert (np.abs(encoded - plain) <= 1e-5 * scale)[~differing].all()
    if differing.any():  # only where the input's last bits decide
        assert (_undecided(case) | ~differing).all()


def _sizes(case: Case) -> np.ndarray:
    """Sizes of the terms that each pre-activation sums."""
    module, x = case.sae.module, case.sae.encoder_input(case.rows).double()
    if case.architecture in WHOLE:
        return np.abs(case.sae.encode(case.rows).numpy()).max(1, keepdims=True) + np.zeros(case.sae.d_sae)
    weight = module.W_enc.double().abs()
    size = x.abs() @ (weight * module.r_mag.double().exp() if case.architecture == "gated" else weight)
    size += sum(bias.double().abs() for bias in _biases(module))
    if getattr(module.cfg, "rescale_acts_by_decoder_norm", False):
        size *= module.W_dec.double().norm(dim=1)
    return size.numpy()


def _undecided(case: Case) -> np.ndarray:
    """Entries whose state in float64 changes when the biases do by rounding errors."""
    states = []
    for sign in (-1, 1):
        module = copy.deepcopy(case.sae.module).double()
        with torch.no_grad():
            for bias in _biases(module):
                bias.add_(sign * 1e-6 * float(_sizes(case).max()))
            states.append(module.encode(case.rows.double()).numpy() != 0)
    return states[0] != states[1]


def _biases(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if name in ("b_enc", "b_gate", "b_mag")]
