"""Direct logit attribution: sums against plain Hugging Face, terms against float64 NumPy and TransformerLens."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from granite_example import granite_of
from lens_example import TEXTS, record, sequences_of
from refusals import refused

from workbench.analysis.stream_terms import check_sum, plan_terms
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import DirectLogitAttribution
from workbench.testing import ProbeContract

SITES = ("embed", "resid_pre.0", "resid_post", "attn_out", "mlp_out", "z", "mlp_post")
PARTS = ("blocks", "sublayers", "heads", "neurons")
PAIR = {"token": " Monday", "against": " Tuesday"}


@pytest.fixture(scope="module")
def models(tiny_models, tiny_tokenizer):
    return {family: Model(module, tiny_tokenizer, f"tiny-{family}") for family, module in tiny_models.items()}


@pytest.fixture(scope="module")
def stores(models, tmp_path_factory):
    folder, stores = tmp_path_factory.mktemp("attribution"), {}
    for family, model in models.items():
        stores[family] = record(model, TEXTS, folder / family, SITES, context=12, bos="always")
    return stores


class TestContract(ProbeContract):
    probe = DirectLogitAttribution
    settings = {"parts": "heads", "detail": 5, "resamples": 20, **PAIR}  # noqa: RUF012

    @pytest.fixture
    def store(self, stores):
        return stores["llama"]

    @pytest.fixture
    def model(self, models):
        return models["llama"]


def plain_logits(module, store) -> np.ndarray:
    """Logits of each row before the soft-cap, by the plain module."""
    with torch.inference_mode():
        parts = [module(input_ids=torch.tensor(ids)[None]).logits[0] for ids in sequences_of(store)]
    logits, cap = torch.cat(parts).double().numpy(), getattr(module.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * np.arctanh(logits / cap)


def ids_of(tokenizer, *texts):
    return [tokenizer.encode(text, add_special_tokens=False)[0] for text in texts]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2"])
def test_the_terms_sum_to_the_models_logits(family, parts, models, stores, tiny_tokenizer):
    store, logits = stores[family], plain_logits(models[family].module, stores[family])
    a, b = ids_of(tiny_tokenizer, " Monday", " Tuesday")
    settings = {"parts": parts, "detail": store.rows, "neurons": 3, "resamples": 10}
    expected = {
        "one": (logits[:, a], {"token": " Monday"}),
        "pair": (logits[:, a] - logits[:, b], PAIR),
        "relative": (logits[:, a] - logits.mean(1), {"token": " Monday", "relative": True}),
        "top": (logits.max(1), {}),
    }
    for answer, answer_settings in expected.values():
        result = DirectLogitAttribution(**settings, **answer_settings).run(store, model=models[family])
        np.testing.assert_allclose(result.data["by_token"].sum("term"), answer, atol=1e-4)
        np.testing.assert_allclose(result.table["contribution"].sum(), answer.mean(), atol=1e-4)
        assert float(result.data["logit"]) == pytest.approx(answer.mean(), abs=1e-4)
        assert float(result.data["error"]) < 1e-5


def test_a_multiplier_of_what_is_added_is_part_of_every_term(tiny_models, tiny_tokenizer, tmp_path):
    """Granite has no attn_out: attention and MLP are the changes of the stream, heads times the multiplier."""
    module = granite_of(tiny_models["llama"], logits_scaling=2.0)
    model = Model(module, tiny_tokenizer, "granite")
    store = record(
        model, TEXTS, tmp_path / "s", ("resid_pre.0", "resid_mid", "resid_post", "z", "mlp_post"), context=12
    )
    logits = plain_logits(module, store).max(1)
    for parts in ("sublayers", "heads", "neurons"):
        data = DirectLogitAttribution(parts=parts, detail=store.rows, resamples=10).run(store, model=model).data
        np.testing.assert_allclose(data["by_token"].sum("term"), logits, atol=1e-4)
        assert float(data["error"]) < 1e-5
        terms = data["term"].to_numpy().tolist()
        assert terms[1] == ("L0H0" if parts == "heads" else "attention of block 0")
        assert ("L0N" in " ".join(terms)) == (parts == "neurons")


def test_each_head_and_neuron_is_what_its_weights_give(models, stores, tiny_tokenizer):
    """GPT-2 in float64 NumPy: z W_O, the bias of the projection, and neurons through W_out, by hand."""
    store, module = stores["gpt2"], models["gpt2"].module
    a, b = ids_of(tiny_tokenizer, " Monday", " Tuesday")
    weight = module.lm_head.weight.detach().double().numpy()
    norm = module.transformer.ln_f
    x = store["resid_post.2"][:].double().numpy()
    direction = (weight[a] - weight[b]) * norm.weight.detach().double().numpy()
    scale = np.sqrt(x.var(1) + norm.eps)[:, None]

    def read(part):
        return ((part - part.mean(1, keepdims=True)) / scale) @ direction

    settings = {"detail": store.rows, "neurons": 48 * 4, "resamples": 10, **PAIR}
    heads = DirectLogitAttribution(parts="heads", **settings).run(store, model=models["gpt2"]).data["by_token"]
    neurons = DirectLogitAttribution(parts="neurons", **settings).run(store, model=models["gpt2"]).data["by_token"]
    for layer, block in enumerate(module.transformer.h):
        w_o, bias = (part.detach().double().numpy() for part in (block.attn.c_proj.weight, block.attn.c_proj.bias))
        z = store["z", layer][:].double().numpy()
        for head in range(4):
            write = z[:, head] @ w_o.reshape(4, 8, 32)[head]
            np.testing.assert_allclose(heads.sel(term=f"L{layer}H{head}"), read(write), atol=1e-6)
        constant = np.broadcast_to(bias, x.shape)
        np.testing.assert_allclose(heads.sel(term=f"bias of attn_out.{layer}"), read(constant), atol=1e-6)
        w_out = block.mlp.c_proj.weight.detach().double().numpy()
        post = store["mlp_post", layer][:].double().numpy()
        write = post[:, 17:18] * w_out[17]
        np.testing.assert_allclose(neurons.sel(term=f"L{layer}N17"), read(write), atol=1e-6)


def test_transformer_lens_gives_the_same_components(models, stores, tiny_tokenizer):
    """Its folded weights centre the unembedding and the writes: differences of logits are the same."""
    from transformer_lens.tools.analysis import direct_logit_attribution

    store, model = stores["llama"], Model(copy.deepcopy(models["llama"].module), tiny_tokenizer, "copy")
    ids = torch.tensor(sequences_of(store)[0])[None]
    bridge = model.bridge()
    with torch.no_grad():
        assert torch.allclose(bridge(ids), model.module(ids).logits, atol=1e-4)
    bridge.enable_compatibility_mode(disable_warnings=True)
    a, b = ids_of(tiny_tokenizer, " Monday", " Tuesday")
    reference = direct_logit_attribution(bridge, ids, answer_tokens=a, incorrect_tokens=b, unit="component")
    result = DirectLogitAttribution(detail=store.rows, resamples=10, **PAIR).run(store)
    row = result.data["by_token"].isel(token=ids.shape[1] - 1)
    names = {"embed": "embedding"} | {
        f"{n}_{kind}": f"{kind}.{n}" for n in range(3) for kind in ("attn_out", "mlp_out")
    }
    pairs = {
        names[name]: value.item()
        for name, value in zip(reference.labels, reference.attribution, strict=True)
        if name in names
    }
    assert len(pairs) == 7
    for name, value in pairs.items():
        assert float(row.sel(term=name)) == pytest.approx(value, abs=1e-4), name


def test_stores_of_half_precision_state_what_they_lose(models, tmp_path, tiny_tokenizer):
    errors = {}
    for dtype in ("float32", "float16", "bfloat16"):
        store = record(models["llama"], TEXTS, tmp_path / dtype, SITES, context=12, bos="always", dtype=dtype)
        result = DirectLogitAttribution(token=" Monday", detail=store.rows, resamples=10).run(store)
        logits = plain_logits(models["llama"].module, store)[:, ids_of(tiny_tokenizer, " Monday")[0]]
        errors[dtype] = float(np.abs(result.data["by_token"].sum("term").to_numpy() - logits).max())
        assert errors[dtype] <= max(1e-4, float(result.data["rounding"]))
    assert errors["float32"] < 1e-5 < errors["float16"] < errors["bfloat16"]


def test_answers_come_from_columns_of_the_store(models, tmp_path):
    texts = [
        {"text": "the little day was", "answer": " Monday", "wrong": " Tuesday"},
        {"text": "Once upon a time", "answer": " day", "wrong": " little"},
        {"text": "Once upon", "answer": "no single token", "wrong": " little"},
    ]
    store = record(models["llama"], texts, tmp_path / "s", SITES, bos="always")
    settings = {"token_column": "answer", "against_column": "wrong", "detail": 99, "resamples": 10}
    result = DirectLogitAttribution(**settings).run(store)
    assert "left out: no single token is named there" in result.data.attrs["note"]
    logits, table = plain_logits(models["llama"].module, store), store.tokens.to_pandas()
    vocab = models["llama"].tokenizer
    early = table[table["document"] < 2]
    expected = [
        logits[row][ids_of(vocab, a)[0]] - logits[row][ids_of(vocab, b)[0]]
        for row, a, b in zip(early["row"], early["answer"], early["wrong"], strict=True)
    ]
    assert result.data["token"].to_numpy().tolist() == early["row"].tolist()
    np.testing.assert_allclose(result.data["by_token"].sum("term"), expected, atol=1e-4)


def test_without_a_tokenizer_ids_are_the_names_of_tokens(tiny_models, tmp_path):
    model = Model(tiny_models["llama"], None, "ids")
    texts = [{"input_ids": [5, 6, 7, 40], "answer": "9"}, {"input_ids": [8, 41, 7], "answer": "12"}]
    store = record(model, texts, tmp_path / "s", SITES, dtype="float32")
    logits = plain_logits(model.module, store)
    result = DirectLogitAttribution(token="9", against="12", detail=99, resamples=10).run(store)
    np.testing.assert_allclose(result.data["by_token"].sum("term"), logits[:, 9] - logits[:, 12], atol=1e-4)
    result = DirectLogitAttribution(token_column="answer", detail=99, resamples=10).run(store)
    expected = logits[np.arange(7), [9] * 4 + [12] * 3]
    np.testing.assert_allclose(result.data["by_token"].sum("term"), expected, atol=1e-4)
    message = refused(RequestError, lambda: DirectLogitAttribution(token="day").run(store))
    assert message == "token: 'day' is no single token; the model has no tokenizer, so id 7 is the token '7'"


def test_a_sum_that_does_not_hold_is_refused_by_name(stores):
    store, rows = stores["llama"], np.arange(4)
    terms = plan_terms(store, "sublayers")
    stream = store["resid_post.2"][rows].double()
    values = {term: term.read(store, rows) for term in terms}
    check_sum(store, values, stream, rows)
    wrong = {term: value * (1.001 if term.name == "mlp_out.1" else 1) for term, value in values.items()}
    with pytest.raises(
        RequestError, match=r"the first sum that breaks is resid_post.1, to which attn_out.1, mlp_out.1"
    ):
        check_sum(store, wrong, stream, rows)


def test_a_part_that_was_not_recorded_is_the_rest_of_its_block(models, tmp_path):
    sites = ("resid_pre.0", "resid_post", "attn_out", "mlp_out.0", "mlp_out.2")
    store = record(models["llama"], TEXTS, tmp_path / "s", sites, context=12)
    names = DirectLogitAttribution(token=" Monday", resamples=10).run(store).table["term"].tolist()
    assert names[:5] == ["embedding", "attn_out.0", "mlp_out.0", "attn_out.1", "rest of block 1"]


def test_position_embeddings_are_a_term_where_there_are_any(stores):
    terms = plan_terms(stores["gpt2"], "sublayers")
    assert [term.name for term in terms][:2] == ["embedding", "position embedding"]
    for family in ("llama", "gemma2"):
        assert plan_terms(stores[family], "sublayers")[1].name == "attn_out.0"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": "Mond"}, "token: 'Mond' is no single token"),
        ({"token": " Monday", "token_column": "answer"}, "token and token_column both name the token"),
        ({"token_column": "answers"}, "token_column 'answers' is no column"),
        ({"parts": "head"}, "parts must be one of blocks, sublayers, heads, neurons, not 'head'"),
        ({"where": "position > 99"}, "selects no token"),
    ],
)
def test_bad_settings_are_refused(settings, message, stores):
    assert message in refused(RequestError, lambda: DirectLogitAttribution(**settings).run(stores["llama"]))


def test_sites_that_are_missing_are_named(models, tmp_path):
    store = record(models["llama"], TEXTS[1:2], tmp_path / "s", ("resid_post", "z"))
    assert "resid_pre.0 is not recorded" in refused(RequestError, lambda: DirectLogitAttribution().run(store))
