"""Gradients in a store: the numbers of plain autograd, each metric, identity, resumption, refusals, command line."""

import json

import numpy as np
import pytest
import torch
from gradient_oracle import gradients_of
from refusals import refused
from warned import warned

import workbench as wb
from workbench.cli.main import main
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model
from workbench.recording import segments
from workbench.recording.segment_gradients import read_metric
from workbench.store.manifest import read_manifest

TEXTS = [
    {"text": "the cat saw a dog", "answer": " Monday", "wrong": " Tuesday"},
    {"text": " Monday Tuesday one", "answer": " Tuesday", "wrong": " Monday"},
    {"text": "no one", "answer": " Monday", "wrong": " Tuesday"},
]
DIFFERENCE = wb.LogitDifference(token_column="answer", against_column="wrong")
SITES = ["resid_post", "z.1", "embed"]


@pytest.fixture(scope="module")
def model(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "llama")


def record(model, out, metric, **settings):
    settings = {"sites": SITES, "segment_rows": 20, "batch_tokens": 30} | settings
    return wb.record(model, TEXTS, out=out, gradient_of=metric, show_progress=False, **settings)


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    return record(model, tmp_path_factory.mktemp("g") / "s.acts", DIFFERENCE)


def ids_of(store):
    tokens = store.tokens.to_pandas()
    return [(part.index.tolist(), torch.tensor(part["token_id"].tolist())) for _, part in tokens.groupby("sequence")]


def expected(model, store, value):
    """Gradients of value(logits of one sequence, its number), sequence by sequence, as rows of the store."""
    sites, tensors = model.site_map.select(SITES), {}
    for number, (rows, ids) in enumerate(ids_of(store)):
        _, gradients = gradients_of(
            model, sites, ids[None], torch.ones_like(ids)[None], lambda logits, number=number: value(logits[0], number)
        )
        for name, gradient in gradients.items():
            tensors.setdefault(name, torch.zeros(store.rows, *gradient.shape[2:]))[rows] = gradient[0]
    return tensors


def token(model, text):
    (token_id,) = model.tokenizer(text)["input_ids"]
    return token_id


def check(store, values):
    for name, gradient in values.items():
        stored = store[f"grad.{name}"]
        assert stored.dtype == torch.float32
        scale = float(gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(stored[:] / scale, gradient / scale, atol=2e-6, rtol=0)


def test_a_store_holds_the_gradients_of_each_sequences_own_answer_beside_the_activations(model, store):
    pairs = [(token(model, text["answer"]), token(model, text["wrong"])) for text in TEXTS]
    check(
        store,
        expected(model, store, lambda logits, number: logits[-1, pairs[number][0]] - logits[-1, pairs[number][1]]),
    )
    plain = wb.record(model, TEXTS, sites=SITES, show_progress=False)
    for name in ("resid_post.1", "z.1", "embed"):
        torch.testing.assert_close(store[name][:], plain[name][:], atol=2e-3, rtol=2e-3)  # other batches, in float16
    assert store["grad.resid_post", 2].site.axes == store["resid_post", 2].site.axes
    assert store["grad.blocks.1.attn.hook_z"][:].shape == store["z.1"][:].shape
    assert store["grad.resid_post", :].shape == (store.rows, 3, 32)
    assert "gradient of logit_difference, token_column 'answer', against_column 'wrong', at -1" in repr(store)
    assert store.verify().empty


def test_other_metrics_and_choices_of_tokens(model, store, tmp_path):
    monday = token(model, " Monday")
    log = record(model, tmp_path / "log", wb.LogProbability(" Monday", at=[0, -1]))
    check(log, expected(model, log, lambda logits, _n: logits.log_softmax(-1)[[0, -1], monday].sum()))
    ids = [ids for _, ids in ids_of(store)]

    def loss(logits, number, rows=slice(None)):
        following = ids[number][1:]
        losses = -logits.log_softmax(-1)[:-1].gather(-1, following[:, None])[:, 0]
        return losses[rows].sum()

    check(whole := record(model, tmp_path / "loss", wb.NextTokenLoss()), expected(model, store, loss))
    at_one = record(model, tmp_path / "one", wb.NextTokenLoss(at=1))
    check(at_one, expected(model, store, lambda logits, number: loss(logits, number, [1])))
    assert whole.manifest.gradient_of == {"kind": "next_token_loss", "at": {"index": "all"}}
    by_sql = record(model, tmp_path / "sql", wb.NextTokenLoss(at=wb.Tokens(sql="position = 1")))
    assert torch.equal(by_sql["grad.z.1"][:], at_one["grad.z.1"][:])


def test_the_metric_is_part_of_the_identity_and_an_interrupted_recording_resumes(model, store, tmp_path, monkeypatch):
    text = refused(RequestError, lambda: record(model, store.path, wb.LogProbability(" Monday")))
    assert "gradient_of: logit_difference, token_column 'answer'" in text
    refused(RequestError, lambda: wb.record(model, TEXTS, sites=SITES, out=store.path, show_progress=False))
    assert record(model, store.path, DIFFERENCE).manifest.fingerprint == store.manifest.fingerprint
    written, real = [], segments.capture_gradients

    def dies(*arguments, **options):
        written.append(0)
        if len(written) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(segments, "capture_gradients", dies)
    with pytest.raises(KeyboardInterrupt):
        record(model, tmp_path / "s", DIFFERENCE)
    monkeypatch.undo()
    assert not read_manifest(tmp_path / "s").complete
    again = record(model, tmp_path / "s", DIFFERENCE)
    assert again.manifest.fingerprint == store.manifest.fingerprint
    message = refused(RequestError, lambda: record(model, tmp_path / "s", DIFFERENCE, sites=[*SITES, "q.0"]))
    assert "was recorded with gradients, so q.0" in message


def test_chosen_rows_and_interventions_go_with_gradients(model, store, tmp_path):
    last = record(model, tmp_path / "last", DIFFERENCE, keep="last")
    rows = [int(rows[-1]) for rows, _ in ids_of(store)]
    torch.testing.assert_close(last["grad.z.1"][:], store["grad.z.1"][rows], atol=1e-6, rtol=1e-4)
    zeroed = wb.record(
        model, TEXTS, sites=SITES, interventions=[wb.Zero("attn_out.1")], gradient_of=DIFFERENCE, show_progress=False
    )
    assert float(zeroed["grad.z.1"][:].abs().max()) == 0  # nothing that it writes comes through
    assert float(zeroed["grad.resid_post.0"][:].abs().max()) > 0


def test_texts_without_a_next_token_are_told(model, tmp_path):
    ids, loss = [[5], [6, 7, 8], [9]], wb.NextTokenLoss()
    with warned("2 of 3 sequences have one token and no next one; their gradients are 0"):
        store = wb.record(model, ids, sites=["resid_post.0"], gradient_of=loss, show_progress=False)
    silent = (store["grad.resid_post.0"][:] == 0).all(-1)
    assert silent.tolist() == [True, False, False, True, True]  # 8, too, predicts nothing
    call = lambda: wb.record(model, ids[::2], gradient_of=loss, out=tmp_path / "s", show_progress=False)  # noqa: E731
    assert "every text has one token, so none has a next one" in refused(RequestError, call)
    assert not (tmp_path / "s").exists()


def test_bad_metrics_are_refused_in_one_line(model, tmp_path):
    for metric, kind, message in (
        (lambda: wb.LogProbability(), RequestError, "give one of token (text or id) and token_column"),
        (lambda: wb.LogitDifference(" Monday"), RequestError, "give one of against (text or id)"),
        (lambda: wb.NextTokenLoss(at="new"), RequestError, "chooses no token of a text"),
        (lambda: wb.LogProbability(" Mondayz"), RequestError, "token: ' Mondayz' is no single token; nearest:  Monday"),
        (lambda: wb.LogProbability(5000), RequestError, "token must be a text or an id from 0 to 319"),
        (lambda: wb.LogProbability(5, at=40), DataError, "chooses no token of sequence 0, which has"),
        (lambda: wb.LogProbability(token_column="reply"), RequestError, "the texts have no column 'reply'"),
        (lambda: wb.LogProbability(token_column="text2"), RequestError, "no column 'text2'"),
    ):
        call = lambda metric=metric: record(model, tmp_path / "s", metric())  # noqa: E731
        assert message in refused(kind, call)
    texts = [{"text": "the cat", "answer": " a dog"}]
    call = lambda: wb.record(model, texts, gradient_of=wb.LogProbability(token_column="answer"), show_progress=False)  # noqa: E731
    assert "answer of sequence 0 is ' a dog', which is no single token" in refused(DataError, call)
    texts = [{"text": "the cat", "answer": None}, {"text": "the day", "answer": " day"}]
    assert "answer of sequence 0 is None, which is no single token" in refused(DataError, call)
    assert "pattern.0 is computed beside" in refused(
        RequestError, lambda: record(model, tmp_path / "s", DIFFERENCE, sites=["pattern"])
    )


def test_metrics_are_read_from_json(tmp_path):
    metric = wb.LogitDifference(" a", " b", at=slice(1, None))
    (tmp_path / "m.json").write_text(json.dumps(metric.described()))
    for text in (json.dumps({"kind": "next_token_loss"}), str(tmp_path / "m.json")):
        assert read_metric(text).described() in (metric.described(), wb.NextTokenLoss().described())
    for text, message in (
        ("{", "gradient_of is no JSON object"),
        ('{"kind": "loss"}', "kinds: log_probability, logit_difference, next_token_loss"),
        ('{"kind": "next_token_loss", "token": 3}', "next_token_loss has no field 'token'"),
    ):
        assert message in refused(RequestError, lambda text=text: read_metric(text))


def test_the_command_line_records_gradients(tiny_models, tiny_tokenizer, tmp_path, capsys):
    tiny_models["llama"].save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    arguments = ["record", str(tmp_path / "m"), "the cat saw a dog", "--sites", "resid_post.1", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--out", str(tmp_path / "s"), "--gradient-of", '{"kind": "next_token_loss", "at": 2}'])
    assert ended.value.code == 0
    assert "grad.resid_post.1 (32,) float32" in capsys.readouterr().out
    rows = wb.open_store(tmp_path / "s")["grad.resid_post.1"][:].abs().sum(1).numpy()
    assert np.array_equal(rows > 0, np.arange(len(rows)) <= 2)  # later tokens do not reach position 2
