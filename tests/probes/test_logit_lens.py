"""The logit lens against plain Hugging Face in float64, planted distributions, and every setting where it matters."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from lens_example import KINDS, TEXTS, followers, log_softmax, record
from planted import linear_unembed, planted_store
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config
from words import WORDS

from workbench.analysis import rows as store_rows
from workbench.analysis.lens import ModelOutput, lens_statistics
from workbench.analysis.lens_figures import lens_grid
from workbench.analysis.rows import next_tokens
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.unembed import load_unembed
from workbench.probes import LogitLens
from workbench.testing import ProbeContract


class TestContract(ProbeContract):
    probe = LogitLens
    settings = {"top_k": 2, "detail": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, llama_store):
        return llama_store


def refusal(call) -> str:
    with pytest.raises(RequestError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


# Planted distributions


def planted(logits, model_logits, target, top_k=1):
    logs = [torch.tensor(part, dtype=torch.float32).log_softmax(-1) for part in (logits, model_logits)]
    statistics = lens_statistics(logs[0], ModelOutput.of(logs[1]), torch.tensor(target), top_k)
    return {name: values.tolist() for name, values in statistics.items()}


def test_uniform_logits():
    values = planted([[0.0] * 7], [[0.0] * 7], [3])
    assert values["entropy"] == pytest.approx([math.log(7)])
    assert values["kl"] == [0]
    assert values["cross_entropy"] == pytest.approx([math.log(7)])
    assert values["rank"] == [1]  # nothing is more probable
    assert values["top_probability"][0] == pytest.approx([1 / 7])


def test_a_certain_lens_and_a_uniform_one():
    certain, uniform = [[0.0, 1000.0, 0.0, 0.0]], [[5.0] * 4]
    values = planted(certain, certain, [1])
    assert (values["entropy"], values["kl"], values["cross_entropy"], values["rank"]) == ([0], [0], [0], [1])
    assert (values["top_id"], values["top_probability"]) == ([[1]], [[1]])
    assert math.copysign(1, values["entropy"][0]) == 1  # "-0.000 nats" is no entropy
    assert planted(uniform, certain, [1])["kl"] == pytest.approx([math.log(4)])
    assert planted(certain, uniform, [0])["rank"] == [2]


def test_kl_is_from_the_model_to_the_lens():
    lens, model = [[math.log(0.9), math.log(0.1)]], [[math.log(0.5), math.log(0.5)]]
    assert planted(lens, model, [0])["kl"] == pytest.approx([0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)])


def test_statistics_against_float64():
    generator = np.random.default_rng(0)
    logits, model = generator.normal(size=(2, 40, 30)) * 4
    target = generator.integers(-1, 30, 40)
    values = planted(logits, model, target.tolist(), top_k=30)
    logs, model_logs = log_softmax(logits), log_softmax(model)
    order = np.argsort(-logs, axis=-1)
    for row in range(40):
        p = np.exp(logs[row])
        assert values["entropy"][row] == pytest.approx(-(p * logs[row]).sum(), abs=1e-5)
        kl = (np.exp(model_logs[row]) * (model_logs[row] - logs[row])).sum()
        assert values["kl"][row] == pytest.approx(kl, abs=1e-4)
        if target[row] < 0:
            assert math.isnan(values["cross_entropy"][row])
            assert values["rank"][row] == 0
        else:
            assert values["cross_entropy"][row] == pytest.approx(-logs[row, target[row]], abs=1e-5)
            assert values["rank"][row] == 1 + order[row].tolist().index(target[row])
        assert values["top_id"][row] == order[row].tolist()
        assert values["top_probability"][row] == pytest.approx(p[order[row]].tolist(), abs=1e-6)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A GPT-2 of 3 blocks and 16 tokens whose stream is planted: nothing after block 0, then a token per block:
    11 after block 1 and 12 after block 2, so sure that no other has any probability."""
    config = GPT2Config(
        vocab_size=16, n_embd=16, n_layer=3, n_head=2, n_positions=16, bos_token_id=0, tie_word_embeddings=False
    )
    module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        body = module.transformer
        body.ln_f.weight.fill_(1)
        module.lm_head.weight.copy_(100 * torch.eye(16))
        body.h[1].mlp.c_proj.bias[11] = 1
        body.h[2].mlp.c_proj.bias[11] = -1
        body.h[2].mlp.c_proj.bias[12] = 1
    return record(module, [[3, 12, 12], [4, 11]], tmp_path_factory.mktemp("scripted") / "acts")


def test_a_planted_stream_through_the_store(scripted):
    data = LogitLens(top_k=1).run(scripted).data
    np.testing.assert_allclose(data["entropy"], np.repeat([[math.log(16)], [0], [0]], 5, axis=1), atol=1e-5)
    np.testing.assert_allclose(data["kl"][0], math.log(16), rtol=1e-5)
    np.testing.assert_allclose(data["kl"][2], 0)
    assert (data["kl"][1] > 100).all()
    assert data["top_id"][1:, :, 0].values.tolist() == [[11] * 5, [12] * 5]
    np.testing.assert_allclose(data["top_probability"][1:], 1)
    np.testing.assert_allclose(data["top_probability"][0], 1 / 16)
    assert data["rank"].values.tolist() == [[1, 1, 0, 1, 0], [2, 2, 0, 1, 0], [1, 1, 0, 2, 0]]
    assert data["mean_accuracy"][1:].values.tolist() == pytest.approx([1 / 3, 2 / 3])
    assert data["mean_agreement"].values.tolist() == [0, 0, 1]


def test_a_model_that_cannot_decide_still_agrees_with_itself(tmp_path, tiny_models):
    """All tokens are equally probable; a top token that depends on top_k would not be the model's own."""
    module = copy.deepcopy(tiny_models["llama"])
    torch.nn.init.zeros_(module.lm_head.weight)
    store = record(module, [[5, 6, 7]], tmp_path / "acts")
    for top_k in (1, 5, 320):
        data = LogitLens(top_k=top_k).run(store).data
        assert data["mean_agreement"].values.tolist() == [1, 1, 1]
        np.testing.assert_allclose(data["mean_entropy"], math.log(320), rtol=1e-6)
        np.testing.assert_allclose(data["mean_cross_entropy"], math.log(320), rtol=1e-6)


# The next token


def test_the_next_token_ends_with_its_sequence(llama_store):
    tokens = llama_store.tokens.to_pandas()
    targets = next_tokens(llama_store)
    assert targets.tolist() == followers(llama_store).tolist()
    last = tokens.groupby("sequence")["row"].max().to_numpy()
    assert len(last) > tokens["document"].nunique()  # a document was cut, and what follows the cut is not predicted
    assert np.flatnonzero(targets < 0).tolist() == last.tolist()


def test_the_next_token_ends_with_its_document(tiny_models, tiny_tokenizer, tmp_path):
    model = Model(tiny_models["llama"], tiny_tokenizer, "tiny")
    store = record(model, TEXTS, tmp_path / "acts", packed=True, context=16)
    tokens = store.tokens.to_pandas()
    assert tokens.groupby("sequence")["document"].nunique().max() > 1
    targets = next_tokens(store)
    assert targets.tolist() == followers(store).tolist()
    ends = tokens.groupby(["sequence", "document"])["row"].max().to_numpy()
    assert np.flatnonzero(targets < 0).tolist() == ends.tolist()
    data = LogitLens(top_k=1).run(store).data
    assert int(data["rows_with_next"]) == len(tokens) - len(ends)
    assert np.isnan(data["cross_entropy"].to_numpy()).sum(1).tolist() == [len(ends)] * 3


def test_no_token_has_a_next(tiny_models, tmp_path):
    store = record(tiny_models["llama"], [[5], [6]], tmp_path / "acts")
    result = LogitLens(top_k=1).run(store)
    assert result.table["next_token"].tolist() == [""] * 6
    assert np.isnan(result.data["mean_cross_entropy"]).all()
    assert np.isnan(result.data["mean_accuracy"]).all()
    assert int(result.data["rows_with_next"]) == 0
    assert result.figures().keys() == {"grid", "by_layer", "depth"}
    assert result.headline().startswith("Cross-entropy of the text not measured: no token has a next one; lens and")


# Settings


@pytest.mark.parametrize("kind", KINDS)
def test_site(wide_store, tiny_models, kind):
    """The lens of another site equals norm and head in float64; the model's output is still that of resid_post."""
    norm, head = tiny_models["llama"].model.norm, tiny_models["llama"].lm_head
    arrays = [wide_store[kind, layer][:].double() for layer in range(3)] + [wide_store["resid_post", 2][:].double()]
    with torch.inference_mode():
        normed = [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon) for x in arrays]
        logs = log_softmax(torch.stack([(x * norm.weight.double()) @ head.weight.double().T for x in normed]).numpy())
    data = LogitLens(site=kind).run(wide_store).data
    np.testing.assert_allclose(data["entropy"], -(np.exp(logs) * logs).sum(-1)[:3], atol=1e-4)
    np.testing.assert_allclose(data["kl"], (np.exp(logs[3]) * (logs[3] - logs)).sum(-1)[:3], atol=1e-4)
    assert (data["kl"][2] == 0).all() == (kind == "resid_post")


def test_only_the_recorded_layers(tiny_models, tmp_path):
    store = record(tiny_models["llama"], [[5, 6, 7]], tmp_path / "acts", ("resid_post.0", "resid_post.2"))
    result = LogitLens().run(store)
    assert result.data["layer"].values.tolist() == [0, 2]
    assert result.table["layer"].tolist() == [0, 0, 0, 2, 2, 2]
    assert float(result.data["mean_kl"][1]) == 0


def test_where(llama_store):
    whole, selection = LogitLens().run(llama_store), LogitLens(where="position % 3 = 1").run(llama_store)
    rows = llama_store.where("position % 3 = 1").ids
    assert 0 < len(rows) < llama_store.rows
    assert selection.data["row"].values.tolist() == rows.tolist()
    for name in ("entropy", "kl", "cross_entropy", "rank", "top_id", "top_probability"):
        np.testing.assert_allclose(selection.data[name], whole.data[name].sel(row=rows), atol=1e-5)
    np.testing.assert_allclose(selection.data["mean_kl"], whole.data["kl"].sel(row=rows).mean("row"), rtol=1e-5)
    assert int(selection.data["rows"]) == len(rows)
    assert set(selection.table["row"]) == set(rows.tolist())


def test_top_k(llama_store):
    single, many = LogitLens(top_k=1).run(llama_store), LogitLens(top_k=320).run(llama_store)
    assert [name for name in single.table if name.startswith("top_")] == ["top_token_1", "top_probability_1"]
    assert many.data.sizes["top"] == 320
    np.testing.assert_allclose(many.data["top_probability"].sum("top"), 1, rtol=1e-5)
    np.testing.assert_array_equal(many.data["top_id"][:, :, 0], single.data["top_id"][:, :, 0])
    np.testing.assert_array_equal(single.data["mean_kl"], many.data["mean_kl"])


@pytest.mark.parametrize("detail", [0, 5])
def test_detail_keeps_fewer_lines_and_the_same_means(llama_store, detail):
    whole, brief = LogitLens().run(llama_store), LogitLens(detail=detail).run(llama_store)
    assert brief.data["row"].values.tolist() == list(range(detail))
    assert len(brief.table) == 3 * detail
    assert brief.figures().keys() == {"grid", "by_layer", "depth"} if detail else {"by_layer"}
    for name in ("entropy", "kl", "cross_entropy", "agreement", "accuracy"):
        np.testing.assert_array_equal(brief.data[f"mean_{name}"], whole.data[f"mean_{name}"])
    for name in ("entropy", "rank", "top_id"):
        np.testing.assert_array_equal(brief.data[name], whole.data[name][:, :detail])


def test_device(llama_store):
    assert refusal(lambda: LogitLens(device="toaster").run(llama_store)).startswith("device 'toaster' cannot be used")
    if torch.cuda.is_available():
        on_cuda, on_cpu = (LogitLens(device=device).run(llama_store).data for device in ("cuda", "cpu"))
        np.testing.assert_allclose(on_cuda["entropy"], on_cpu["entropy"], atol=1e-4)
    else:
        assert refusal(lambda: LogitLens(device="cuda").run(llama_store)).startswith("device 'cuda' cannot be used")


def test_settings_that_cannot_be():
    assert refusal(lambda: LogitLens(top_k=0)) == "top_k must be at least 1, not 0"
    assert refusal(lambda: LogitLens(detail=-1)) == "detail must be at least 0, not -1"


# Memory


class LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor over the vocabulary that any operation gives, weights aside."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.rows = vocab, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.t.default:  # W_U seen from the side
            return output
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == self.vocab:
                self.rows = max(self.rows, tensor.shape[0])
        return output


def test_never_more_than_a_block_of_logits(llama_store, monkeypatch):
    settings = LogitLens(where="position != 3", detail=10)
    whole = settings.run(llama_store)
    rows = int(whole.data["rows"])
    monkeypatch.setattr(store_rows, "_BLOCK_ROWS", 1)
    for block in (7, 1, rows):
        monkeypatch.setattr(store_rows, "_BLOCK_BYTES", block * 4 * 320)
        with LargestLogits(320) as largest:
            blocked = settings.run(llama_store)
        assert largest.rows == block
        for name in whole.data.data_vars:
            np.testing.assert_allclose(blocked.data[name], whole.data[name], atol=1e-5)
    monkeypatch.setattr(store_rows, "_BLOCK_BYTES", 1)  # less than a row of logits: a row at a time
    assert settings.run(llama_store).data["rank"].equals(whole.data["rank"])
    monkeypatch.setattr(store_rows, "_BLOCK_ROWS", 5)
    with LargestLogits(320) as largest:
        settings.run(llama_store)
    assert largest.rows == 5


# The table


def test_the_table_says_what_the_arrays_say(llama_store):
    result = LogitLens(top_k=2).run(llama_store)
    data, table, tokens = result.data, result.table, llama_store.tokens.to_pandas()
    assert table.columns.tolist() == [
        *("layer", "row", "sequence", "position", "document", "token", "next_token"),
        *("entropy", "kl", "js", "tv", "cross_entropy", "surprise", "rank"),
        *("top_token_1", "top_probability_1", "top_token_2", "top_probability_2", "clipped"),
    ]
    assert len(table) == 3 * llama_store.rows
    words = load_unembed(llama_store.path).tokens
    targets = followers(llama_store)
    for line in table.to_dict("records"):
        cell = data.sel(layer=line["layer"], row=line["row"])
        token_row = tokens.loc[line["row"]]
        assert [line[name] for name in ("sequence", "position", "document", "token")] == [
            token_row[name] for name in ("sequence", "position", "document", "token")
        ]
        target = targets[line["row"]]
        assert line["next_token"] == ("" if target < 0 else words[target])
        for name in ("entropy", "kl", "js", "tv", "cross_entropy", "surprise", "rank"):
            np.testing.assert_array_equal(line[name], cell[name])
        for k in (1, 2):
            assert line[f"top_token_{k}"] == words[int(cell["top_id"].sel(top=k))]
            assert line[f"top_probability_{k}"] == cell["top_probability"].sel(top=k)


def planted_lens(path, *layers):
    """States that are logits, of the next token (1) or of the others (-1); the last block says the text."""
    ids = np.random.default_rng(0).integers(0, 4, (5, 8))
    after = np.eye(4)[np.roll(ids, -1, axis=1)].reshape(40, 4)
    sites = {f"resid_post.{layer}": 5.0 * sign * after for layer, sign in enumerate((*layers, 1))}
    return LogitLens(top_k=1).run(planted_store(path, ids.tolist(), sites, linear_unembed(np.eye(4))))


@pytest.mark.parametrize(
    ("layers", "above", "agreement"),
    [
        ((-1, 1), "up to layer 0", "more than half of the tokens from layer 1 on."),
        ((1, -1), "at 1 of 3 layers, the last of them layer 1", "at most 100 % of the tokens before the model's own"),
        ((-1, -1), "up to layer 1", "at most 0 % of the tokens before the model's own output (layer 0)."),
        ((1, 1), "at no layer", "more than half of the tokens from layer 0 on."),
    ],
)
def test_the_headline_compares_with_a_uniform_guess_and_leaves_out_the_last_layer(tmp_path, layers, above, agreement):
    """Agreement at the last layer, and from a layer on after which another does not agree, is none."""
    line = planted_lens(tmp_path / "x.acts", *layers).headline()
    assert f"at or above a uniform guess (1.39 nats) {above}; lens and model agree" in line
    assert agreement in line


def test_every_variable_has_a_unit(llama_store):
    units = {name: variable.attrs["units"] for name, variable in LogitLens().run(llama_store).data.items()}
    for name in [name for name in units if name.endswith(("_low", "_high"))]:
        assert units.pop(name) == units[name.rpartition("_")[0]]
    nats = ["entropy", "kl", "js", "cross_entropy", "surprise"]
    assert units == {
        **dict.fromkeys([*nats, *(f"mean_{name}" for name in nats), "uniform_cross_entropy"], "nats"),
        **dict.fromkeys(["mean_agreement", "mean_accuracy", "depth_share"], "share of tokens"),
        **dict.fromkeys(["tv", "mean_tv", "top_probability"], "probability"),
        **dict.fromkeys(["rows", "rows_with_next", "nonfinite_rows"], "tokens"),
        **{"clipped": "values", "rank": "1 = top", "top_id": "token id"},
        **{"prediction_depth": "index on the layer axis", "error_auc": "area under the ROC curve"},
    }


def test_a_model_without_tokenizer_gives_ids(wide_store):
    result = LogitLens(top_k=1).run(wide_store)
    ids = result.data["top_id"].to_numpy().ravel()
    assert result.table["top_token_1"].tolist() == [f"[{i}]" for i in ids]
    assert result.table["next_token"].tolist() == ["[6]", "[7]", "[8]", "[9]", "", "[11]", "[12]", ""] * 3


def test_words_are_single_tokens(llama_store):
    """Tokens of the text, with their space, as the lens names them."""
    named = set(LogitLens().run(llama_store).table["next_token"])
    assert {f" {word}" for word in WORDS if word != "Once"} <= named


# Refusals


def test_a_site_that_is_not_recorded(llama_store):
    assert refusal(lambda: LogitLens(site="attn_out").run(llama_store)) == (
        f"attn_out.0 is not recorded in {llama_store.path}; recorded are 6: resid_mid.0, resid_post.0, resid_mid.1, "
        "resid_post.1, resid_mid.2, resid_post.2; to add it: "
        f"workbench add {llama_store.path} --sites attn_out.0"
    )


def test_the_last_block_is_not_recorded(tiny_models, tmp_path):
    store = record(Model(tiny_models["llama"], None, "tiny"), [[5, 6]], tmp_path / "acts", ("resid_post.0:2",))
    assert refusal(lambda: LogitLens().run(store)) == (
        f"resid_post.2 is not recorded in {store.path}; recorded are 2: resid_post.0, resid_post.1; to add it: "
        f"workbench add {store.path} --sites resid_post.2"
    )


def test_a_layer_is_no_kind_of_site(llama_store):
    assert refusal(lambda: LogitLens(site="resid_post.1").run(llama_store)) == (
        "site must be a kind without a layer, such as resid_post, not 'resid_post.1'"
    )


def test_sites_that_no_lens_reads(wide_store):
    assert refusal(lambda: LogitLens(site="mlp_post").run(wide_store)) == (
        "site 'mlp_post' has axes (row, d_mlp); a site of axes (row, d_model) is needed"
    )
    assert refusal(lambda: LogitLens(site="z").run(wide_store)) == (
        "site 'z' has axes (row, head, d_head); a site of axes (row, d_model) is needed"
    )


def test_no_unembedding(tiny_models, tmp_path):
    module = copy.deepcopy(tiny_models["llama"])
    module.lm_head = torch.nn.Sequential(module.lm_head)
    store = record(module, [[5, 6]], tmp_path / "acts")
    assert refusal(lambda: LogitLens().run(store)) == (
        "store acts holds no unembedding: LlamaForCausalLM has no linear language-model head"
    )


def test_nothing_selected(llama_store):
    assert refusal(lambda: LogitLens(where="token = 'zork'").run(llama_store)) == (
        f"where \"token = 'zork'\" selects no token of {llama_store.rows}"
    )


def test_more_top_tokens_than_there_are(llama_store):
    assert refusal(lambda: LogitLens(top_k=321).run(llama_store)) == (
        "top_k is 321 and the vocabulary has 320; give at most that"
    )


# Figures


def test_the_grid_is_the_table(llama_store):
    result = LogitLens(top_k=3).run(llama_store)
    table = result.table
    for figure, sequence, first, tokens in (
        (result.figure("grid"), 0, 0, 12),
        (lens_grid(result, sequence=1), 1, 0, 12),
        (lens_grid(result, sequence=1, first=3, tokens=4), 1, 3, 4),
    ):
        heat = figure.data[0]
        chosen = table[(table["sequence"] == sequence) & (table["position"] >= first)]
        chosen = chosen[chosen["position"] < first + tokens]
        wide = chosen.pivot(index="layer", columns="position", values="top_probability_1")
        layers = slice(1, -2)  # one line: its tokens below, the next tokens and a gap above
        np.testing.assert_array_equal(np.array(heat.z)[layers], wide.to_numpy())
        assert list(figure.layout.yaxis.ticktext) == ["0", "1", "2", "input", "next"]
        top = chosen.pivot(index="layer", columns="position", values="top_token_1").to_numpy()
        for text, token in zip(np.ravel(np.array(heat.text)[layers]), top.ravel(), strict=True):
            if token.isprintable() and not set(token) & set("<>&$\"'"):
                assert text == token.replace(" ", "·")
        assert figure.layout.title.text == f"Logit lens of tiny-llama, resid_post, sequence {sequence}"
        assert heat.colorbar.title.text == "probability"


def test_the_grid_shows_two_lines_of_tokens(tiny_models, tmp_path):
    store = record(tiny_models["llama"], [list(range(5, 45))], tmp_path / "acts")
    grid = LogitLens().run(store).figure().layout.meta["grid"]
    assert (grid["tokens"], grid["line"]) == (28, 14)


def test_hovering_tells_the_whole_cell(scripted):
    result = LogitLens(top_k=1).run(scripted)
    cells = result.figure("grid").data[0].customdata
    assert cells[1 + 1][0] == (
        "<b>layer 1, position 0, token 3</b><br>1.000  [11]"
        f"<br>entropy 0.000 nats, KL to output {result.data['kl'].values[1, 0]:.3f} nats"
        f"<br>next [12]: rank 2, {result.data['cross_entropy'].values[1, 0]:.3f} nats"
    )
    assert "next" not in cells[1 + 1][2]


def test_the_curves_are_the_means(llama_store):
    result = LogitLens().run(llama_store)
    figure = result.figure("by_layer")
    drawn = {curve.name: (list(curve.x), list(curve.y)) for curve in figure.data if curve.name}  # a band has no name
    layers = [0, 1, 2]
    assert drawn == {
        "entropy of the lens": (layers, result.data["mean_entropy"].values.tolist()),
        "KL(model ‖ lens)": (layers, result.data["mean_kl"].values.tolist()),
        "cross-entropy of the text": (layers, result.data["mean_cross_entropy"].values.tolist()),
    }
    assert figure.layout.title.text == "Logit lens of tiny-llama"
    subtitle = f"mean over {llama_store.rows} tokens; bands: 95 % intervals over documents"
    assert figure.layout.title.subtitle.text == subtitle
    assert figure.layout.yaxis.title.text == "nats"


def test_a_sequence_that_is_not_in_the_table(llama_store):
    result = LogitLens(detail=5).run(llama_store)
    assert refusal(lambda: lens_grid(result, sequence=1)) == (
        "sequence 1 from position 0 is not in the table; see result.table['sequence']"
    )
    assert refusal(lambda: lens_grid(result, first=9)) == (
        "sequence 0 from position 9 is not in the table; see result.table['sequence']"
    )
