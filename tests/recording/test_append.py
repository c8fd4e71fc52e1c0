"""Texts added to a store: once, and with their own metadata."""

from __future__ import annotations

import copy
import re

import pytest
from refusals import refused
from store_example import contents
from warned import warned

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model

FIRST, SECOND = [[5, 6, 7], [8, 9]], [[10, 11], [12]]


@pytest.fixture
def model(tiny_models):
    return Model(tiny_models["llama"], None, "tiny")


def record(model, texts, out, **options):
    return wb.record(model, texts, out=out, sites=["resid_post.0"], segment_rows=3, show_progress=False, **options)


def test_the_same_append_twice_adds_its_texts_once(model, tmp_path):
    record(model, FIRST, tmp_path / "s")
    assert record(model, SECOND, tmp_path / "s", append=True).rows == 8
    before = contents(tmp_path / "s")
    with warned(r"^append: .* ends with these texts already, 3 rows; nothing is added. .* pass append=\"again\" "):
        store = record(model, SECOND, tmp_path / "s", append=True)
    assert contents(tmp_path / "s") == before
    assert store.rows == 8
    assert record(model, FIRST, tmp_path / "s", append=True).rows == 13  # earlier texts, not the last ones
    store = record(model, FIRST, tmp_path / "s", append="again")
    assert store.rows == 18
    assert store.tokens["token_id"].to_pylist()[8:] == [5, 6, 7, 8, 9] * 2


def test_texts_with_other_metadata_are_other_texts(model, tmp_path):
    labelled = [{"text": ids, "label": str(sum(ids))} for ids in FIRST]
    relabelled = [{**record, "label": "x"} for record in labelled]
    record(model, labelled, tmp_path / "s")
    assert refused(RequestError, lambda: record(model, relabelled, tmp_path / "s")) == (
        f"{tmp_path / 's'} holds other texts than those requested, or other metadata or spans of them; give the same, "
        "or choose another out"
    )
    store = record(model, relabelled, tmp_path / "s", append=True)
    assert store.tokens["label"].to_pylist() == ["18"] * 3 + ["17"] * 2 + ["x"] * 5


def test_the_command_line_appends_again(tmp_path, capsys):
    from workbench.cli import main as cli

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["record", "demo", "Anna saw Rome", "--out", str(tmp_path / "s"), *arguments])
        return stop.value.code, capsys.readouterr()

    assert run("--sites", "resid_post.0")[0] == 0
    rows = wb.open_store(tmp_path / "s").rows
    with warned("ends with these texts already"):
        assert run("--sites", "resid_post.0", "--append")[0] == 0
    assert wb.open_store(tmp_path / "s").rows == rows
    assert run("--append", "again", "--sites", "resid_post.0")[0] == 0
    assert wb.open_store(tmp_path / "s").rows == 2 * rows
    assert "--append [again]" in run("--help")[1].out


STRICT = (
    "{% for message in messages %}{% if message['role'] != 'user' %}{{ raise_exception('no ' + message['role']) }}"
    "{% endif %}{{ message['content'] }}{% endfor %}"
)
CHAT = [{"role": "user", "content": "one two"}]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([CHAT, "text"], {}, r"document 1 \(texts\[1\]\) is a text or token ids, and each document before it a chat"),
        (["text", CHAT], {}, r"document 1 \(texts\[1\]\) is a chat, and each document before it a text"),
        ([[{"role": "wizard", "content": "x"}]], {}, r"document 0: the chat template refuses the chat \(no wizard"),
        (["one two"], {"where": "token = 'zzz'"}, "where: none in the store, token = 'zzz' requested"),
    ],
)
def test_refused_texts_leave_the_store_as_it_was(texts, options, message, tiny_models, tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = STRICT
    model = Model(tiny_models["llama"], tokenizer, "tiny")
    record(model, ["one two"], tmp_path / "s")
    before = contents(tmp_path / "s")
    for how in ({"append": True}, {} if options else {"overwrite": True}):
        text = refused(RequestError, lambda how=how: record(model, texts, tmp_path / "s", **how, **options))
        assert re.search(message, text)
        assert contents(tmp_path / "s") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]
