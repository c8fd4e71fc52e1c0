"""Changes of attention against weights that are edited after an eager softmax, in passes and in generation."""

import pytest
import torch
from change_oracles import TYPES, eager, edited_softmax, generated, logits, redistributed, scaled
from refusals import refused

import workbench as wb
from workbench.experiments.architectures.tiny import tiny_model
from workbench.io.errors import DataError, RequestError
from workbench.model.attention import pattern_blocks, tap_attention
from workbench.model.attention_records import attention_call
from workbench.model.forward import attention_name
from workbench.model.load import Model, load_model

IDS = torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)
MASK[1, 9:] = 0
HEADS, KEYS, LATER = [1, 3], [0, 2], slice(2, None)
FAMILIES = ["gpt2", "llama", "gpt_neox", "gemma2"]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tiny_models, tiny_tokenizer):
    return Model(tiny_models[request.param], tiny_tokenizer, request.param)


@pytest.fixture(scope="module", params=TYPES)
def any_model(request):
    return load_model(tiny_model(request.param))


@pytest.fixture(scope="module")
def llama(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "llama")


def close(model, first, second, plain):
    """Equal to 1e-5 of the largest logit at all real tokens, and not the plain logits."""
    real, scale = MASK.bool(), plain.abs().max()
    assert (first - second)[real].abs().max() < 1e-5 * scale
    assert (first - plain)[real].abs().max() > 1e-3 * scale


def check_scores(model, layer, calls):
    plain, attending = logits(model.module, IDS, attention_mask=MASK), eager(model.module)
    for factor in (2.0, 0.5, 0):
        with edited_softmax(calls, scaled(factor, HEADS, KEYS, LATER)):
            expected = logits(attending, IDS, attention_mask=MASK)
        record = wb.ScaleAttention(layer, HEADS, KEYS, factor, queries=LATER)
        with wb.intervene(model, record) as run:
            changed = logits(model.module, IDS, attention_mask=MASK)
        close(model, changed, expected, plain)
    bias = wb.BiasAttention(layer, HEADS, KEYS, torch.tensor(0.5).log().item(), queries=LATER)
    with edited_softmax(calls, scaled(0.5, HEADS, KEYS, LATER)):
        expected = logits(attending, IDS, attention_mask=MASK)
    with wb.intervene(model, bias) as run:
        close(model, logits(model.module, IDS, attention_mask=MASK), expected, plain)
    assert run.counts[0].exempt == 0


def check_redistribution(model, layer, calls):
    plain, attending = logits(model.module, IDS, attention_mask=MASK), eager(model.module)
    with edited_softmax(calls, redistributed(0.25, HEADS, KEYS, slice(None))):
        expected = logits(attending, IDS, attention_mask=MASK)
    with wb.intervene(model, wb.RedistributeAttention(layer, HEADS, KEYS, 0.25)) as run:
        close(model, logits(model.module, IDS, attention_mask=MASK), expected, plain)
    assert run.counts[0].exempt == 2  # the first query of each sequence sees the first key alone


def check_generation(model, layer):
    static = {"cache_implementation": "static", "disable_compile": True}
    padded = torch.cat([torch.full((1, 3), 1), IDS[:1]], dim=1)
    mask = {"attention_mask": torch.tensor([[0] * 3 + [1] * 12])}
    results = []
    for ids, settings in (
        (IDS[:1], {}),
        (IDS[:1], {"use_cache": False}),
        (IDS[:1], static),
        (padded, mask),
        (padded, mask | static),
    ):
        records = (
            wb.ScaleAttention(layer, 1, [0, 3, 11], 3.0, queries=slice(1, None)),
            wb.BiasAttention(layer, 2, slice(2, 14), -1.5),
        )
        with wb.intervene(model, *records):
            results.append(generated(model.module, ids, 6, **settings))
    assert (results[0] - generated(model.module, IDS[:1], 6)).abs().max() > 1e-3
    for result in results:
        assert (result - results[0]).abs().max() < 1e-5 * results[0].abs().max()


def test_scores_are_scaled_as_in_the_closed_form(model):
    check_scores(model, 1, 1)


def test_weight_is_redistributed_as_after_an_eager_softmax(model):
    check_redistribution(model, 1, 1)


def test_generation_is_the_same_with_any_cache_and_padding(model):
    check_generation(model, 1)


@pytest.mark.torture
def test_scores_of_any_architecture_are_scaled_as_in_the_closed_form(any_model):
    hybrid = any_model.architecture.startswith("Qwen3Next")
    check_scores(any_model, 3 if hybrid else 1, 0 if hybrid else 1)
    check_generation(any_model, 3 if hybrid else 1)


@pytest.mark.parametrize("kind", ["xglm", "codegen"])
def test_scores_are_changed_before_the_softmax_in_attention_of_its_own_kind(tmp_path, kind):
    """XGLM refuses a mask by head; CodeGen divides its scores after the mask."""
    model, patterns = load_model(tiny_model(kind)), {}
    for name, records in (("plain", ()), ("scaled", wb.ScaleAttention(1, None, 2, 3.0))):
        patterns[name] = wb.record(
            model,
            [IDS[0].tolist()],
            sites=["pattern.1"],
            dtype="float32",
            out=tmp_path / name,
            show_progress=False,
            interventions=records,
        )["pattern.1"][:]
    expected = patterns["plain"] / (1 + 2 * patterns["plain"][..., 2:3])
    expected[..., 2] *= 3
    if kind == "xglm":
        text = refused(RequestError, lambda: wb.intervene(model, wb.ScaleAttention(1, 0, 2, 3.0)))
        assert text == "layer 1: the attention of XGLMForCausalLM takes one mask for all heads; give head=None"
    torch.testing.assert_close(patterns["scaled"], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.torture
def test_weight_of_any_architecture_is_redistributed_or_refused(any_model):
    if any_model.architecture.startswith(("Falcon", "Bloom", "GPTJ", "GptOss")):
        text = refused(RequestError, lambda: wb.intervene(any_model, wb.RedistributeAttention(1, 1, 0)))
        assert "AttentionInterface" in text or "learned sinks" in text
    else:
        hybrid = any_model.architecture.startswith("Qwen3Next")
        check_redistribution(any_model, 3 if hybrid else 1, 0 if hybrid else 1)


def test_a_neutral_record_takes_no_other_path_and_counts(model):
    plain = logits(model.module, IDS, attention_mask=MASK)
    with wb.intervene(model, wb.ScaleAttention(1, 1, 0, 1), wb.BiasAttention(1, None, 2, 0)) as run:
        assert torch.equal(logits(model.module, IDS, attention_mask=MASK), plain)
    assert run.table()["rows"].tolist() == [21, 21]


def test_the_table_does_not_call_attention_unchanged_that_it_did_not_compare(model):
    records = wb.ScaleAttention(1, 1, 0, 0), wb.Zero("z.0", head=0)
    with wb.intervene(model, *records) as run:
        logits(model.module, IDS, attention_mask=MASK)
    table = run.table()
    assert table["changed"].isna().tolist() == table["relative_change"].isna().tolist() == [True, False]
    assert table.loc[1, "changed"] == table.loc[1, "rows"]


def weights_of(model, ids=IDS, layer=1):
    calls, part = [], model.module.get_submodule(attention_call(model, layer))
    with tap_attention(attention_name(model.module), {part: calls.append}):
        logits(model.module, ids)
    return torch.cat([block for _, block in pattern_blocks(calls[0])], dim=2)


def test_planted_weights_change_as_computed_by_hand(llama):
    """Weights (.5, .3, .2) of one query, planted by biases."""
    before = weights_of(llama)[0, 0, 2, :3]
    planted = [
        wb.BiasAttention(1, 0, key, float((torch.tensor(weight) / before[key]).log()), queries=2)
        for key, weight in enumerate((0.5, 0.3, 0.2))
    ]
    for factor, expected in ((2, (2 / 3, 0.2, 0.4 / 3)), (0.5, (1 / 3, 0.4, 0.8 / 3)), (0, (0, 0.6, 0.4))):
        with wb.intervene(llama, *planted, wb.ScaleAttention(1, 0, 0, factor, queries=2)):
            weights = weights_of(llama)
        torch.testing.assert_close(weights[0, 0, 2, :3], torch.tensor(expected), atol=1e-6, rtol=0)
        torch.testing.assert_close(weights[:, 1:], weights_of(llama)[:, 1:], atol=0, rtol=0)
    with wb.intervene(llama, *planted, wb.RedistributeAttention(1, 0, 0, 0.4, queries=2)):
        weights = weights_of(llama)[0, 0, 2, :3]
    torch.testing.assert_close(weights, torch.tensor((0.2, 0.48, 0.32)), atol=1e-6, rtol=0)


def test_a_query_keeps_its_last_key(llama):
    with wb.intervene(llama, wb.ScaleAttention(1, 2, slice(0, 3), 0)) as run:
        weights = weights_of(llama)
    assert run.counts[0].exempt == 6  # queries 0 to 2 of two sequences
    assert float(weights[:, 2, 3:, :3].abs().max()) == 0
    torch.testing.assert_close(weights[:, 2, :3], weights_of(llama)[:, 2, :3], atol=0, rtol=0)


def test_a_frozen_pattern_is_that_of_the_other_run(model, tmp_path):
    donor_ids = IDS.flip(1)
    sites = [
        site.short for site in model.site_map.sites.values() if site.layer == 1 and site.tap.part in ("query", "key")
    ]
    store = wb.record(model, donor_ids.tolist(), sites=sites, dtype="float32", out=tmp_path / "a", show_progress=False)
    with wb.intervene(model, wb.FreezePattern(1, None, store)) as run:
        frozen = weights_of(model)
    assert torch.equal(frozen, weights_of(model, donor_ids))
    assert run.counts[0].rows == 24
    if model.name == "llama":
        text = refused(RequestError, lambda: wb.intervene(model, wb.FreezePattern(1, 1, store)))
        assert "2 query heads of layer 1 share each key head" in text
        with wb.intervene(model, wb.FreezePattern(1, [2, 3], store)):
            half = weights_of(model)
        assert torch.equal(half[:, 2:], weights_of(model, donor_ids)[:, 2:])
        assert torch.equal(half[:, :2], weights_of(model)[:, :2])


def test_padding_behind_a_shorter_text_needs_no_donor(llama, tmp_path):
    """A recording pads on the right; a pattern is frozen, and keys are counted, at its tokens alone."""
    texts, donors = ([IDS[0, :12].tolist(), ids.tolist()] for ids in (IDS[1, :9], IDS[1, 3:]))
    plain = {"sites": ["rot_q.1", "rot_k.1", "pattern.1"], "dtype": "float32", "show_progress": False}
    donor = wb.record(llama, donors, out=tmp_path / "a", **plain)
    frozen = wb.record(llama, texts, out=tmp_path / "b", interventions=wb.FreezePattern(1, None, donor), **plain)
    assert torch.equal(frozen["pattern.1"][:], donor["pattern.1"][:])
    with wb.intervene(llama, wb.Zero("rot_k.1")) as run:
        logits(llama.module, IDS, attention_mask=MASK)
    assert run.counts[0].rows == 12 + 9


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: wb.ScaleAttention(1, 0, 0, -1), "factor must be at least 0"),
        (lambda: wb.ScaleAttention(9, 0, 0, 1), "layer must be a whole number, from 0 to 2"),
        (lambda: wb.ScaleAttention(1, 4, 0, 1), "head must be query heads from 0 to 3 of layer 1, not 4"),
        (lambda: wb.BiasAttention(1, 0, 0, float("nan")), "value must be finite, not nan"),
        (lambda: wb.RedistributeAttention(1, 0, 0, 1.5), "keep must be from 0 to 1"),
        (lambda: wb.ScaleAttention(1, 0, "first", 1), "at must be a position"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(llama, record, message):
    assert refused(RequestError, lambda: wb.intervene(llama, record())).startswith(message)


def test_a_key_that_never_comes_is_an_error(llama):
    def run():
        with wb.intervene(llama, wb.ScaleAttention(1, 0, 40, 2)):
            logits(llama.module, IDS)

    assert "no pass had a key at position 40" in refused(DataError, run)
