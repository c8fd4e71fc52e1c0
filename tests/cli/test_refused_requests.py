"""Wrong requests of the command line: exit code 2 and one line that says what to do."""

from __future__ import annotations

import pytest
from command_line import refused, run

import workbench as wb


def test_unknown_verbs():
    assert refused("prbe") == ("unknown command 'prbe'; nearest: probe, probes, compare; see workbench --help")
    assert refused("zzz") == "unknown command 'zzz'; see workbench --help"
    assert refused("--limit").startswith("unknown command '--limit'; ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "a", "--zork"), "unknown option --zork; see workbench info --help"),
        (("info", "a", "b"), "unexpected argument 'b'; see workbench info --help"),
        (
            ("record", "m", "t", "--out", "o", "--dtype", "int4"),
            "--dtype must be one of float16, bfloat16, float32, not 'int4'",
        ),
        (("record", "m", "t", "--out", "o", "--context", "many"), "--context"),
        (("record", "m", "t", "--out", "o", "--context", "0"), "--context must be at least 1, not 0"),
        (("record", "m", "t", "--out", "o", "--sites"), "--sites is empty; name at least one, for example resid_post"),
        (("record", "m", "t", "--out", "o", "--contxt=3"), "unknown option --contxt; nearest: --context"),
        (("query", "a", "b", "--limit", "few"), "--limit"),
    ],
)
def test_wrong_options(arguments, message):
    text = refused(*arguments)
    assert message in text
    assert text.endswith(f"; see workbench {arguments[0]} --help")
    assert refused(*arguments, encoding="ascii") == text


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("record",), "MODEL, TEXT, --out PATH"),
        (("record", "m"), "TEXT, --out PATH"),
        (("record", "m", "t"), "--out PATH"),
        (("query", "a"), "PREDICATE"),
        (("info",), "STORE"),
        (("report", "--out", "o"), "RESULT"),
        (("compare",), "STORE_A, STORE_B"),
    ],
)
def test_missing_arguments(arguments, missing):
    assert refused(*arguments) == f"missing {missing}; see workbench {arguments[0]} --help"


def test_a_text_that_an_option_took(tmp_path):
    out = tmp_path / "acts"
    text = refused("record", "demo", "--sites", "resid_post", "z", "a text", "--out", out)
    advice = "--sites resid_post,z -- 'a text'"
    assert text == (
        f"missing TEXT; --sites took all of resid_post z 'a text': write TEXT before the options, or {advice}; "
        "see workbench record --help"
    )
    assert run("record", "demo", "--out", out, "--sites", "resid_post,z", "--", "a text")[0] == 0
    assert {site.label.partition(".")[0] for site in wb.open_store(out).sites} == {"resid_post", "z"}


def test_wrong_paths_for_a_recording(stories260k, stories, tmp_path):
    out = ("--out", tmp_path / "acts")
    models = stories260k.parent
    assert refused("record", models / "stories26K", stories, *out) == (
        f"model {str(models / 'stories26K')!r}: no such directory (models/ has no 'stories26K'; nearest: stories260K)"
    )
    text = refused("record", stories260k, stories.parent / "tn.jsonl", *out)
    assert text.startswith(f"texts: no file {str(stories.parent / 'tn.jsonl')!r}; nearest: ten.jsonl")
    assert refused("record", stories260k, "Once", stories, *out).startswith("texts: no file 'Once'")
    assert refused("record", stories260k, "hf:a/b", stories, *out) == (
        "hf:a/b cannot be mixed with other texts; record it alone and add the others with --append"
    )
    assert refused("record", stories260k, stories, *out, "--tokenizer", tmp_path / "words") == (
        f"--tokenizer {str(tmp_path / 'words')!r}: no such directory ({tmp_path.name}/ has no 'words')"
    )
    assert refused("record", "some/model", stories, *out, "--revision", "v1").startswith("model 'some/model' is no ")
    assert not (tmp_path / "acts").exists()


def test_an_unknown_site(stories260k, stories, tmp_path):
    text = refused("record", stories260k, stories, "--out", tmp_path / "acts", "--sites", "resid_post", "resid_pst.3")
    assert text.startswith("site 'resid_pst.3' is unknown; ")
    assert "resid_post" in text
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize("verb", ["info", "verify", "query", "probe"])
def test_wrong_store_paths(verb, store, tmp_path):
    def ask(path):
        more = {"query": ("position = 0",), "probe": ("--out", tmp_path / "lens")}.get(verb, ())
        return refused(*((verb, "logit-lens") if verb == "probe" else (verb,)), path, *more)

    assert ask(store.parent / "tn.acts") == f"no store at {store.parent / 'tn.acts'}; nearest: ten.acts"
    assert (
        ask(store / "manifest.json")
        == f"{store / 'manifest.json'} is a file; a store is a directory with a manifest.json"
    )
    assert (
        ask(tmp_path / "a" / "b") == f"no store at {tmp_path / 'a' / 'b'}: the folder {tmp_path / 'a'} does not exist"
    )


def test_a_damaged_store_is_exit_code_1(store, tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    code, out, err = run("info", tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(f"workbench: {tmp_path / 'manifest.json'}")
    assert err.count("\n") == 1


def test_wrong_predicates(store):
    columns = "row, sequence, position, document, token_id, token, char_start, char_end, is_special, "
    columns += "sequence_length, position_from_end, is_last"
    assert refused("query", store, "tokn = 3") == (
        f"query 'tokn = 3': Referenced column \"tokn\" not found in FROM clause; columns: {columns}; "
        "nearest: token, token_id"
    )
    assert refused("query", store, "position >").startswith("query 'position >': syntax error")
    assert refused("query", store, " ").startswith("query is empty; ")
    assert refused("query", store, "position = 0", "--limit", -1) == "--limit must be at least 0, not -1"


def test_wrong_requests_of_a_probe(store, tmp_path):
    out = ("--out", tmp_path / "lens")
    assert refused("probe", "logit-len", store, *out).startswith(
        "probe 'logit-len' is not installed; nearest: logit-lens, "
    )
    assert refused("probe", "logit-lens", store).startswith("missing --out PATH; ")
    assert refused("probe", "logit-lens", store, *out, "--zork").startswith("unknown option --zork; ")
    assert "--top-k must be at least 1, not 0" in refused("probe", "logit-lens", store, *out, "--top-k", 0)
    assert refused("probe", "logit-lens", store, *out, "--top-k", 600) == (
        "--top-k is 600 and the vocabulary has 512; give at most that"
    )
    assert refused("probe", "logit-lens", store, *out, "--site", "z").startswith(f"z.0 is not recorded in {store}; ")
    assert not (tmp_path / "lens").exists()


def test_a_taken_out_is_refused_before_the_probe_runs(store, tmp_path, monkeypatch):
    (tmp_path / "mine").touch()
    monkeypatch.setattr("workbench.probes.logit_lens.LogitLens.run", lambda *_arguments: pytest.fail("ran"))
    assert refused("probe", "logit-lens", store, "--out", tmp_path) == (
        f"--out {str(tmp_path)!r} exists and is not a result; choose another folder"
    )
