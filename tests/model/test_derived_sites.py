"""Derived sites: statistics of patterns, values and residuals, computed in the pass that would have recorded those."""

from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.experiments.architectures.tiny import tiny_model as tiny_of_type
from workbench.io.errors import DataError, RequestError
from workbench.model import capture as capturing
from workbench.model.attention import Columns, row_entropy
from workbench.model.discovery import find_sites
from workbench.model.load import Model
from workbench.sites.grammar import DERIVED, SHORT_NAMES, Site, SiteMap, Tap

RAGGED = [24, 9, 24, 1, 17]  # more than the windows of the models here, 16 and 8
OF_PATTERN = ("attn_received", "attn_received_entropy", "attn_entropy", "attn_first")
OF_TOKENS = ("attn_current", "attn_previous", "attn_recent", "attn_duplicate", "attn_induction")
ALL = (*OF_PATTERN, *OF_TOKENS)


def record(model, texts, out, sites, **options):
    return wb.record(model, texts, out=out, sites=sites, **{"dtype": "float32", "show_progress": False, **options})


@pytest.fixture(scope="module")
def sequences():
    random = np.random.default_rng(0)
    return [random.integers(8, 14, n).tolist() for n in RAGGED]  # tokens repeat, some right away


def eager_patterns(module, ids) -> list[np.ndarray]:
    """[head, query, key] of each layer in float64: plain Hugging Face, eager, on one sequence without padding."""
    eager = copy.deepcopy(module)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    return [weights[0].double().numpy() for weights in attentions]


def statistics(pattern: np.ndarray) -> dict[str, np.ndarray]:
    """The four kinds, [position, head], one cell after the other."""
    heads, n, _ = pattern.shape
    values = {kind: np.zeros((n, heads)) for kind in OF_PATTERN}
    for h, i in np.ndindex(heads, n):
        column, row = pattern[h, i:, i], pattern[h, i]
        values["attn_received"][i, h] = sum(column) / (n - i)
        values["attn_received_entropy"][i, h] = entropy(column)
        values["attn_entropy"][i, h] = entropy(row)
        values["attn_first"][i, h] = row[0]
    return values


def token_statistics(pattern: np.ndarray, ids: list[int]) -> dict[str, np.ndarray]:
    """Attention to the keys that the tokens determine, [position, head], one cell after the other."""
    heads, n, _ = pattern.shape
    values = {kind: np.zeros((n, heads)) for kind in OF_TOKENS}
    for h, i in np.ndindex(heads, n):
        row, earlier = pattern[h, i], [d for d in range(i) if ids[d] == ids[i] and d + 1 != i]
        values["attn_current"][i, h] = row[i]
        values["attn_previous"][i, h] = row[i - 1] if i else 0
        values["attn_recent"][i, h] = sum(row[max(0, i - 5) : i])
        values["attn_duplicate"][i, h] = sum(row[d] for d in earlier)
        values["attn_induction"][i, h] = sum(row[d + 1] for d in earlier)
    return values


def entropy(weights) -> float:
    shares = [w / sum(weights) for w in weights if w > 0]
    return -sum(share * np.log(share) for share in shares)


# ---- against plain Hugging Face -------------------------------------------------------------------------


def check_patterns(module, sequences, store, atol=1e-5):
    first = 0
    for ids in sequences:
        for layer, pattern in enumerate(eager_patterns(module, ids)):
            for kind, expected in (statistics(pattern) | token_statistics(pattern, ids)).items():
                stored = store[kind, layer][first : first + len(ids)]
                np.testing.assert_allclose(stored, expected, rtol=0, atol=atol, err_msg=f"{kind}.{layer}")
        first += len(ids)


def test_statistics_of_patterns_are_those_of_eager_attention(tiny_model, sequences, tmp_path):
    """Ragged lengths in one padded batch, keys shared (GQA), windows, soft-caps."""
    store = record(Model(tiny_model, None, "tiny"), sequences, tmp_path / "s", ALL)
    assert {site.axes for site in store.sites} == {("row", "head")}
    assert {site.shape for site in store.sites} == {(4,)}
    check_patterns(tiny_model, sequences, store)


def test_where_the_module_returns_its_weights(sequences, tmp_path):
    module = tiny_of_type("bloom")
    (site,) = find_sites(module).select(["attn_received.1"])
    assert site.tap.part == "returned_weights"
    check_patterns(module, sequences, record(Model(module, None, "bloom"), sequences, tmp_path / "s", ALL))


def test_where_the_model_attends_eagerly(tiny_models, sequences, tmp_path):
    module = copy.deepcopy(tiny_models["llama"])
    module.set_attn_implementation("eager")
    check_patterns(module, sequences, record(Model(module, None, "eager"), sequences, tmp_path / "s", ALL))


def test_norms_are_those_of_the_sites(tiny_model, sequences, tmp_path):
    """Each query head has its own number, also where two of them read one value."""
    store = record(Model(tiny_model, None, "t"), sequences, tmp_path / "s", ["v", "resid_post", "v_norm", "resid_norm"])
    for layer in range(3):
        value = np.linalg.norm(np.asarray(store["v", layer]).astype(float), axis=-1)
        heads = np.arange(4) // (4 // value.shape[1])
        np.testing.assert_allclose(store["v_norm", layer][:], value[:, heads], rtol=1e-5)
        residual = np.linalg.norm(np.asarray(store["resid_post", layer]).astype(float), axis=-1)
        np.testing.assert_allclose(store["resid_norm", layer][:], residual, rtol=1e-5)
    assert (store["v_norm", 0].axes, store["resid_norm", 0].axes) == (("row", "head"), ("row",))


def test_norms_do_not_overflow_where_the_model_computes_in_half_precision(tiny_models, tmp_path):
    module = copy.deepcopy(tiny_models["gpt2"]).half()
    with torch.no_grad():
        module.transformer.wte.weight.fill_(300)  # 32 of them squared are more than 65,504
    store = record(Model(module, None, "half"), [[3, 4]], tmp_path / "s", ["resid_post.0", "resid_norm.0"])
    expected = np.linalg.norm(np.asarray(store["resid_post", 0]).astype(float), axis=-1)
    assert expected.min() > 1000
    np.testing.assert_allclose(store["resid_norm", 0][:], expected, rtol=1e-3)


# ---- sums over pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 5, 12])
def test_columns_are_the_same_from_any_pieces(rows):
    generator = np.random.default_rng(3)
    pattern = np.tril(generator.dirichlet(np.ones(12), (2, 3, 12)))
    pattern /= pattern.sum(-1, keepdims=True)
    lengths = (12, 7)
    real = torch.arange(12) < torch.tensor(lengths)[:, None]
    columns = Columns(real)
    for first in range(0, 12, rows):
        columns.add(first, torch.from_numpy(pattern[:, :, first : first + rows]))
    for b, n in enumerate(lengths):
        expected = statistics(pattern[b, :, :n, :n])
        np.testing.assert_allclose(columns.received()[b, :n], expected["attn_received"], atol=1e-12)
        np.testing.assert_allclose(columns.entropy()[b, :n], expected["attn_received_entropy"], atol=1e-12)


def test_queries_before_a_key_do_not_count():
    """Alpha of bidirectional attention is still a mean over the queries from the key on."""
    columns = Columns(torch.ones(1, 4))
    columns.add(0, torch.full((1, 1, 4, 4), 0.25))
    assert columns.received()[0, :, 0].tolist() == [0.25] * 4
    np.testing.assert_allclose(columns.entropy()[0, :, 0], np.log([4, 3, 2, 1]), atol=1e-6)


def test_a_padding_query_that_is_nan_counts_for_nothing():
    block = torch.full((1, 1, 2, 2), 0.5)
    block[:, :, 1] = torch.nan
    columns = Columns(torch.tensor([[1, 0]]))
    columns.add(0, block)
    assert columns.received()[0, 0].item() == 0.5


def test_entropies_of_nothing_and_of_one():
    block = torch.tensor([[[[1.0, 0, 0], [0.0, 1.0, 0], [0.0, 1.0, 0]]]])
    assert row_entropy(block)[0, :, 0].tolist() == [0, 0, 0]
    columns = Columns(torch.ones(1, 3))
    columns.add(0, block)
    np.testing.assert_allclose(columns.entropy()[0, :, 0], [0, np.log(2), 0], atol=1e-7)
    assert columns.received()[0, :, 0].tolist() == [pytest.approx(1 / 3), 1, 0]


def test_a_head_with_a_sink_logit_has_the_entropy_of_what_tokens_get():
    """Rows that sum to less than 1 are compared at sum 1."""
    assert row_entropy(torch.tensor([[[[0.2, 0.2]]]])).item() == pytest.approx(np.log(2))


# ---- one pass, in pieces, once --------------------------------------------------------------------------


def test_a_pattern_is_computed_once_for_all_that_is_asked_of_it(tiny_models, sequences, tmp_path, monkeypatch):
    calls = []
    original = capturing.pattern_blocks

    def counted(call, rows):
        calls.append(call)
        return original(call, rows)

    monkeypatch.setattr(capturing, "pattern_blocks", counted)
    model = Model(tiny_models["llama"], None, "t")
    model.site_map  # noqa: B018 its trial passes look at patterns too
    sites = ["pattern.1", *(f"{kind}.1" for kind in ALL)]
    store = record(
        model, sequences[:1], tmp_path / "s", sites, context=RAGGED[0]
    )  # as long as can be: no key is padded
    assert len(calls) == 1
    pattern = np.asarray(store["pattern", 1]).transpose(1, 0, 2).astype(float)
    for kind, expected in (statistics(pattern) | token_statistics(pattern, sequences[0])).items():
        np.testing.assert_allclose(store[kind, 1][:], expected, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_statistic_sees_more_than_a_few_query_rows(tiny_models, implementation, tmp_path, monkeypatch):
    monkeypatch.setattr(capturing, "_QUERY_ROWS", 8)
    lengths = []
    original = Columns.add
    monkeypatch.setattr(
        Columns, "add", lambda self, first, block: [lengths.append(block), original(self, first, block)]
    )
    module = copy.deepcopy(tiny_models["llama"])
    module.set_attn_implementation(implementation)
    ids = [[8 + i * i % 7 for i in range(30)]]
    store = record(Model(module, None, "t"), ids, tmp_path / "s", [f"{kind}.0" for kind in (*ALL, "pattern")])
    assert [block.shape[2] for block in lengths] == [8, 8, 8, 6]
    pattern = eager_patterns(module, ids[0])[0]
    expected = statistics(pattern) | token_statistics(pattern, ids[0])
    for kind in ALL:
        np.testing.assert_allclose(store[kind, 0][:], expected[kind], atol=1e-5)


def test_the_pass_ends_behind_the_last_derived_site(tiny_models):
    module = copy.deepcopy(tiny_models["llama"])
    calls = []
    module.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    sites = find_sites(module).select(["attn_received.1", "v_norm.1", "resid_norm.0"])
    calls.clear()
    values = {}
    ids = torch.arange(8, 20)[None]
    capturing.capture(module, sites, ids, torch.ones_like(ids), lambda site, x, _first: values.update({site.short: x}))
    assert not calls
    assert {short: tuple(x.shape) for short, x in values.items()} == {
        "attn_received.1": (1, 12, 4),
        "v_norm.1": (1, 12, 4),
        "resid_norm.0": (1, 12),
    }


def test_weights_that_are_not_returned_are_an_error():
    module = tiny_of_type("bloom")
    (site,) = find_sites(module).select(["attn_received.1"])
    module.get_submodule(site.tap.path).register_forward_hook(lambda _m, _a, output: output[0])
    ids = torch.arange(8, 12)[None]
    text = refused(DataError, lambda: capturing.capture(module, [site], ids, torch.ones_like(ids), print))
    assert text == "site attn_received.1: it ran twice, or without a tensor, in one forward pass"


# ---- the store ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [("float16", 1e-3), ("bfloat16", 1e-2)])
def test_half_precision_segments_and_appending(tiny_models, sequences, tmp_path, dtype, rtol):
    """A site without axes is a column of the store like any other."""
    model, kinds = Model(tiny_models["llama"], None, "t"), ["resid_norm", "attn_received"]
    exact = record(model, sequences, tmp_path / "exact", kinds)
    out = tmp_path / "half"
    record(model, sequences[:2], out, kinds, dtype=dtype, segment_rows=10)
    store = record(model, sequences[2:], out, kinds, dtype=dtype, segment_rows=10, append=True)
    assert len(store.manifest.segments) > 2
    assert store.verify().empty
    for kind in kinds:
        np.testing.assert_allclose(np.asarray(store[kind, 2]), exact[kind, 2][:], rtol=rtol, atol=1e-6)
    norm = store["resid_norm", 2]
    assert norm.shape == (store.rows,)
    assert torch.equal(norm[torch.tensor([[40, 3]])], torch.stack([norm[40], norm[3]])[None])
    assert torch.equal(store.where("position = 0")["resid_norm", 2], norm[np.cumsum([0, *RAGGED[:-1]])])


def test_the_command_line_takes_them(tmp_path):
    from workbench.cli import main as cli

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little dog.")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        arguments = ["record", "demo", str(text), "--out", str(tmp_path / "s"), "--sites", "resid_post.1"]
        with contextlib.suppress(SystemExit):
            cli.main([*arguments, "attn_received", "resid_norm.0:2"])
    recorded = {site.short for site in wb.open_store(tmp_path / "s").sites}
    assert recorded == {"resid_post.1", "resid_norm.0", "resid_norm.1", *(f"attn_received.{i}" for i in range(4))}


# ---- names ----------------------------------------------------------------------------------------------


def handmade(**changes) -> SiteMap:
    sites = [
        Site("blocks.0.attn.hook_v", ("head", "d_head"), (2, 8), Tap("v", "out")),
        Site("blocks.0.attn.hook_z", ("head", "d_head"), (6, 8), Tap("z", "in")),
        Site("blocks.0.hook_resid_post", ("stream", "d_model"), (3, 8), Tap("block", "out")),
    ]
    reason = {"blocks.0.attn.hook_pattern": "it is a secret"}
    return SiteMap(**{**_map(sites), "missing": reason, **changes})


def _map(sites):
    named = {site.name: site for site in sites}
    return {"sites": named, "synonyms": {}, "blocks": "layers", "n_layers": 1, "adapter": None}


def test_what_is_derived_stands_behind_what_it_is_derived_from():
    sites = [(site.short, site.axes, site.shape) for site in handmade().recordable.values()]
    assert sites == [
        ("v.0", ("head", "d_head"), (2, 8)),
        ("v_norm.0", ("head",), (6,)),
        ("z.0", ("head", "d_head"), (6, 8)),
        ("resid_post.0", ("stream", "d_model"), (3, 8)),
        ("resid_norm.0", ("stream",), (3,)),
    ]
    assert handmade().recordable["blocks.0.attn.hook_v_norm"].of == handmade().sites["blocks.0.attn.hook_v"]


def test_a_model_offers_all_that_its_sites_allow(tiny_models):
    site_map = find_sites(tiny_models["llama"])
    kinds = {site.kind for site in site_map.recordable.values()} - {site.kind for site in site_map.sites.values()}
    assert kinds == {*DERIVED}
    assert [site.short for site in site_map.select(["resid_norm", "v_norm.1"])] == [
        "resid_norm.0",
        "v_norm.1",
        "resid_norm.1",
        "resid_norm.2",
    ]
    (site,) = site_map.select(["blocks.1.attn.hook_attn_received"])
    assert (site.short, site.tap) == ("attn_received.1", site_map.select(["pattern.1"])[0].tap)


def test_flat_values_have_no_norm_for_each_head():
    flat = Site("blocks.0.attn.hook_v", ("d_v",), (16,), Tap("v", "out"))
    assert [site.short for site in SiteMap(**_map([flat]), missing={}).recordable.values()] == ["v.0"]


def test_a_synonym_is_derived_from_too():
    """Derived sites also work for the synonym of a site."""
    site = Site("blocks.0.hook_out", ("d_model",), (8,), Tap("block", "out"))
    synonyms = {"blocks.0.hook_resid_post": "blocks.0.hook_out"}
    site_map = SiteMap(**{**_map([site]), "synonyms": synonyms}, missing={})
    assert [site.name for site in site_map.select(["resid_norm"])] == ["blocks.0.hook_resid_norm"]


def test_globs_leave_them_out():
    assert [site.short for site in handmade().select(["blocks.0.attn.hook_v*"])] == ["v.0"]


def test_a_derived_site_is_missing_for_the_reason_its_source_is():
    text = refused(RequestError, lambda: handmade().select(["attn_received"]))
    assert text == "site 'attn_received' cannot be recorded here: it is a secret; this model has v, z, resid_post"
    text = refused(RequestError, lambda: handmade().select(["blocks.0.attn.hook_attn_first"]))
    assert "'blocks.0.attn.hook_attn_first' cannot be recorded here: it is a secret" in text
    assert "does not exist in a model without" in refused(
        RequestError, lambda: handmade(missing={}).select(["attn_entropy.0"])
    )


@pytest.mark.parametrize("kind", DERIVED)
def test_a_derived_kind_is_a_kind(kind):
    assert "{layer}" in SHORT_NAMES[kind]
    assert DERIVED[kind] in SHORT_NAMES
