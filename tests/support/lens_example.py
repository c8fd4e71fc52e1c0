"""Small stores for lenses, and the same readings by plain Hugging Face in float64."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch

import workbench as wb

NORMS = {
    "GPT2LMHeadModel": "transformer.ln_f",
    "LlamaForCausalLM": "model.norm",
    "GPTNeoXForCausalLM": "gpt_neox.final_layer_norm",
    "Gemma2ForCausalLM": "model.norm",
    "PhiForCausalLM": "model.final_layernorm",
}
TEXTS = [
    "Once upon a time the little day was Monday and Tuesday was the day to Once upon a time",
    "Monday",
    "the little day was to the little Monday and Tuesday and the time was Once",
]
KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def record(model, texts, out, sites=("resid_post",), **options):
    return wb.record(model, texts, out=out, sites=sites, **{"dtype": "float32", "show_progress": False, **options})


def sequences_of(store) -> list[np.ndarray]:
    table = store.tokens.to_pandas()
    return [part["token_id"].to_numpy() for _, part in table.groupby("sequence", sort=True)]


def plain_logits(module, sequences) -> np.ndarray:
    """[layer, row, vocab] in float64, from output_hidden_states and the model's own logits; nothing of ours."""
    norm, head = module.get_submodule(NORMS[type(module).__name__]), module.get_output_embeddings()
    cap = getattr(module.config, "final_logit_softcapping", None)
    module = copy.deepcopy(module)  # transformers leaves hooks in a model that was asked for hidden states
    parts = []
    with torch.inference_mode():
        for ids in sequences:
            output = module(input_ids=torch.tensor(ids)[None], output_hidden_states=True)
            earlier = [head(norm(hidden[0])) for hidden in output.hidden_states[1:-1]]
            if cap is not None:
                earlier = [cap * torch.tanh(logits / cap) for logits in earlier]
            parts.append(torch.stack([*earlier, output.logits[0]]).double().numpy())
    return np.concatenate(parts, axis=1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def check_against(data, logs: np.ndarray, targets: np.ndarray, atol: float = 1e-4) -> None:
    """Every array of a result against log-probabilities [layer, row, vocab]; targets -1: none."""
    p = np.exp(logs)
    known = targets >= 0
    at = np.where(known, np.take_along_axis(logs, np.maximum(targets, 0)[None, :, None], -1)[..., 0], np.nan)
    close = {"rtol": 0, "atol": atol}
    np.testing.assert_allclose(data["entropy"], -(p * logs).sum(-1), **close)
    np.testing.assert_allclose(data["kl"], (p[-1] * (logs[-1] - logs)).sum(-1), **close)
    np.testing.assert_allclose(data["cross_entropy"], -at, **close)
    middle = np.log((p + p[-1]) / 2)
    js = ((p * (logs - middle)).sum(-1) + (p[-1] * (logs[-1] - middle)).sum(-1)) / 2
    np.testing.assert_allclose(data["js"], js, **close)
    np.testing.assert_allclose(data["tv"], abs(p - p[-1]).sum(-1) / 2, **close)
    chosen = logs[-1].argmax(-1)[None, :, None]
    np.testing.assert_allclose(data["surprise"], -np.take_along_axis(logs, chosen, -1)[..., 0], **close)
    rank = data["rank"].to_numpy()
    assert (rank[:, ~known] == 0).all()
    surely, perhaps = ((logs > at[..., None] + shift).sum(-1) for shift in (atol, -atol))
    assert (1 + surely <= rank)[:, known].all()
    assert (rank <= perhaps)[:, known].all()  # the target itself is among `perhaps`
    ids, top = data["top_id"].to_numpy(), data["top_probability"].to_numpy()
    np.testing.assert_allclose(top, np.take_along_axis(p, ids.astype(int), -1), **close)
    np.testing.assert_allclose(top, -np.sort(-p, axis=-1)[..., : top.shape[-1]], **close)
    assert all(len(set(line)) == len(line) for line in ids.reshape(-1, ids.shape[-1]).tolist())
    means = {"entropy": -(p * logs).sum(-1).mean(1), "kl": (p[-1] * (logs[-1] - logs)).sum(-1).mean(1)}
    means |= {"cross_entropy": -at[:, known].mean(1), "agreement": (logs.argmax(-1) == logs[-1].argmax(-1)).mean(1)}
    means |= {"accuracy": (logs.argmax(-1) == targets)[:, known].mean(1)}
    for name, mean in means.items():
        np.testing.assert_allclose(data[f"mean_{name}"], mean, **close)
    assert (int(data["rows"]), int(data["rows_with_next"])) == (len(targets), known.sum())


def followers(store) -> np.ndarray:
    """next_tokens again, one row at a time."""
    rows = store.tokens.select(["token_id", "sequence", "document"]).to_pylist()
    return np.array(
        [
            after["token_id"] if (row["sequence"], row["document"]) == (after["sequence"], after["document"]) else -1
            for row, after in itertools.pairwise(rows)
        ]
        + [-1]
    )
