"""Small random weights for autoencoders of other libraries, files made of them, and features that a `Sae` gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

D_IN, D_SAE, K = 8, 30, 4
X = np.random.default_rng(0).normal(size=(40, D_IN)).astype(np.float32) + 0.5
_R = np.random.default_rng(1)
W, V = _R.normal(size=(D_IN, D_SAE)), _R.normal(size=(D_SAE, D_IN))
B, C, T = _R.normal(size=D_SAE), _R.normal(size=D_IN), np.abs(_R.normal(size=D_SAE))
G, M = _R.normal(size=(2, D_SAE))
MAG = _R.normal(size=D_SAE) / 5
NORM = np.linalg.norm(V, axis=1)


def relu(x):
    return np.maximum(x, 0)


def largest(x, k=K):
    """The k largest of each row, zeros elsewhere."""
    return np.where((-x).argsort(1).argsort(1) < k, x, 0)


def jump(pre, threshold):
    return relu(pre) * (pre > threshold)


def single(weights: dict) -> dict[str, np.ndarray]:
    return {key: np.array(part, np.float32, order="C") for key, part in weights.items()}


def tensors(path: Path, weights: dict, metadata: dict[str, str] | None = None) -> Path:
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(single(weights), path, metadata)
    return path


def text(path: Path, content: dict | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path.parent


def features(sae, x=X) -> np.ndarray:
    """Dense features by the sparse encoder, after a check that `sae.encode` gives the same."""
    import torch
    from scipy.sparse import csr_array

    from workbench.sae.encode import encoder

    rows = encoder(sae)(torch.from_numpy(x))
    parts = (part.numpy() for part in (rows.value, rows.feature, rows.indptr))
    sparse = csr_array(tuple(parts), shape=(len(x), sae.d_sae)).toarray()
    np.testing.assert_allclose(sparse, sae.encode(torch.from_numpy(x)).numpy(), rtol=1e-4, atol=1e-4)
    return sparse


def decoded(sae, activations) -> np.ndarray:
    import torch

    return sae.decode(torch.from_numpy(np.float32(activations))).numpy()


def assert_close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
