"""The command line: the whole way on real input, exit codes, and one line for whatever is wrong."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from command_line import refused, run
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import workbench as wb
from workbench.cli import main as cli
from workbench.model.load import Model

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}  # output is buffered, as a user has it


def process(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


MAIN = "from workbench.cli.main import main; main()"


@pytest.fixture(scope="module")
def stories(tinystories, tmp_path_factory):
    """Ten stories as a file."""
    path = tmp_path_factory.mktemp("cli") / "ten.jsonl"
    with tinystories.open() as lines:
        path.write_text("".join(itertools.islice(lines, 10)))
    return path


@pytest.fixture(scope="module")
def recorded(stories260k, stories):
    """The store of ten stories, and what recording them said."""
    store = stories.parent / "ten.acts"
    return store, run("record", stories260k, stories, "--out", store)


@pytest.fixture(scope="module")
def store(recorded):
    return recorded[0]


# The whole way


def test_record(recorded, stories260k, stories):
    store, (code, out, err) = recorded
    assert (code, err) == (0, "")
    opened = wb.open_store(store)
    assert out == (
        f"store    {store}\n"
        "model    stories260K (LlamaForCausalLM, 5 layers, d_model 64)\n"
        "sites    5: resid_post.0 (64,) float16, resid_post.1 (64,) float16, resid_post.2 (64,) float16, "
        "resid_post.3 (64,) float16, resid_post.4 (64,) float16\n"
        f"rows     {opened.rows:,} in 1 segments (complete)\n"
        f"texts    10 documents, {len(set(opened.tokens['sequence'].to_pylist()))} sequences, 1 part\n"
        "unembed  yes\n"
    )
    text = json.loads(stories.read_text().splitlines()[0])["text"]
    first = wb.load_model(stories260k).tokenizer(text)["input_ids"][:256]
    assert opened.tokens["token_id"].to_pylist()[:256] == first
    assert run("record", stories260k, stories, "--out", store) == (0, out, "")  # there already


def test_info(recorded):
    store, (_, told, _) = recorded
    assert run("info", store) == (0, told, "")


def test_verify(store, tmp_path):
    assert run("verify", store) == (0, "0 errors, 0 notes\n", "")
    damaged = Path(shutil.copytree(store, tmp_path / "damaged"))
    file = damaged / "segments" / "00000" / "resid_post.3.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = run("verify", damaged)
    assert (code, err) == (1, "")
    *findings, last = out.splitlines()
    assert last == "1 errors, 0 notes"
    assert findings[0].startswith("error  00000/resid_post.3.safetensors: ")


def test_query(store):
    code, out, err = run("query", store, "token = ' Lily' AND position > 0", "--limit", 2)
    rows = wb.open_store(store).where("token = ' Lily' AND position > 0")
    assert (code, err) == (0, "")
    heading, *lines, count = out.splitlines()
    names = ["row", "sequence", "position", "document", "token_id", "token", "char_start", "char_end", "is_special"]
    assert heading.split() == names
    table = rows.tokens.to_pandas().astype(str)
    for line, (_, row) in zip(lines, table.head(2).iterrows(), strict=True):
        assert re.split(r"  +", line) == [*row[:5], "' Lily'", *row[6:]]
    assert count == f"{len(rows)} of {wb.open_store(store).rows:,} rows, 2 shown"


def test_the_limit_of_a_query(store):
    predicate = "position = 0"
    total = len(wb.open_store(store).where(predicate))
    rows = wb.open_store(store).rows
    assert total < 30
    assert len(run("query", store, predicate)[1].splitlines()) == 1 + min(total, 20) + 1
    assert run("query", store, predicate, "--limit", 100)[1].splitlines()[-1] == f"{total} of {rows:,} rows"
    assert run("query", store, predicate, "--limit", 0)[1] == f"{total} of {rows:,} rows, 0 shown\n"
    assert run("query", store, "position < 0") == (0, f"0 of {rows:,} rows\n", "")


def test_probe(store, tmp_path):
    out = tmp_path / "lens"
    code, said, err = run("probe", "logit-lens", store, "--out", out, "--top-k", 2, "--where", "position < 5")
    result = wb.load_result(out)
    assert (code, err) == (0, "")
    assert said.splitlines() == [
        repr(result),
        f"figure  {out}/figures/by_layer.html",
        f"figure  {out}/figures/depth.html",
        f"figure  {out}/figures/grid.html",
    ]
    assert result.provenance["settings"] == {
        "site": "resid_post",
        "where": "position < 5",
        "top_k": 2,
        "detail": 10_000,
        "device": "cpu",
    }
    assert result.data["row"].size == len(wb.open_store(store).where("position < 5"))


def test_probes():
    code, out, err = run("probes")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    names = [
        "attention-sinks",
        "future-lens",
        "future-prompts",
        "logit-lens",
        "successor-heads",
        "token-erasure",
        "tuned-lens",
    ]
    assert [line.split()[0] for line in lines] == names
    assert lines[3] == (
        "  logit-lens       What each layer would predict, were the model to stop there: top tokens, entropy, "
        "KL to the output, loss."
    )


def test_the_command_in_a_shell(store, tmp_path):
    """Real processes: as installed, the exit code and the two streams are the system's."""
    ran = process(MAIN, "query", store, "position = 0", "--limit", "1")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[1].startswith("0    0         0         0         1         '<s>'")
    ran = process(MAIN, "verify", tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"workbench: {tmp_path} is no store: it has no manifest.json\n"


# What is asked of a recording


def test_settings_of_a_recording(stories260k, stories, tmp_path):
    out = tmp_path / "acts"
    code, _, err = run(
        *("record", stories260k, stories, "--out", out, "--sites", "resid_post.1:3", "blocks.0.attn.hook_z"),
        *("--context", 32, "--dtype", "bfloat16", "--bos", "never", "--packed", "--max-rows", 100),
        *("--segment-rows", 64, "--batch-tokens", 64, "--metadata"),
    )
    assert (code, err) == (0, "")
    opened = wb.open_store(out)
    assert [site.label for site in opened.sites] == ["z.0", "resid_post.1", "resid_post.2"]
    assert {site.dtype for site in opened.sites} == {"bfloat16"}
    assert opened.rows == 100
    assert max(opened.tokens["position"].to_pylist()) == 31
    assert not any(opened.tokens["is_special"].to_pylist())
    assert [segment.rows for segment in opened.manifest.segments] == [64, 36]


def test_several_texts(stories260k, tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time")
    (tmp_path / "b.txt").write_text("The end")
    long_text = "a little day " * 40  # longer than a file's name may be
    out = tmp_path / "acts"
    code, _, err = run(
        "record", stories260k, tmp_path / "a.txt", "Lily ran", tmp_path / "b.txt", long_text, "--out", out
    )
    assert (code, err) == (0, "")
    tokens = wb.open_store(out).tokens.to_pandas().query("not is_special")
    texts = tokens.groupby("document")["token"].agg(lambda parts: "".join(parts).strip())
    assert texts.tolist() == ["Once upon a time", "Lily ran", "The end", long_text.strip()]


def test_append(stories260k, tmp_path):
    out = tmp_path / "acts"
    assert run("record", stories260k, "Once upon a time", "--out", out)[0] == 0
    code, told, _ = run("record", stories260k, "The end of it", "--out", out, "--append")
    assert code == 0
    assert "2 documents, 2 sequences, 2 parts" in told


def test_another_tokenizer_and_dtype(stories260k, tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "words")
    out = tmp_path / "acts"
    code, _, err = run(
        *("record", stories260k, "the little day", "--out", out, "--tokenizer", tmp_path / "words"),
        *("--model-dtype", "float16", "--device", "cpu"),
    )
    assert (code, err) == (0, "")
    opened = wb.open_store(out)
    assert opened.tokens["token_id"].to_pylist() == tiny_tokenizer("the little day")["input_ids"]
    assert opened.manifest.model.dtype == "float16"


# Wrong requests


def test_unknown_verbs():
    assert refused("prbe") == ("there is no command 'prbe'; nearest: probe, probes, compare; see workbench --help")
    assert refused("zzz") == "there is no command 'zzz'; see workbench --help"
    assert refused("--limit").startswith("there is no command '--limit'; ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("info", "a", "--zork"), "Unrecognized options: --zork; see workbench info --help"),
        (("info", "a", "b"), "Unrecognized options: b; see workbench info --help"),
        (("record", "m", "t", "--out", "o", "--dtype", "int4"), "Expected one of ('float16', 'bfloat16', 'float32')"),
        (("record", "m", "t", "--out", "o", "--context", "many"), "--context"),
        (("record", "m", "t", "--out", "o", "--context", "0"), "context must be at least 1, not 0"),
        (("record", "m", "t", "--out", "o", "--sites"), "sites is empty; name at least one, for example resid_post"),
        (("record", "m", "t", "--out", "o", "--contxt=3"), "Unrecognized options: --contxt=3; nearest: --context; see"),
        (("query", "a", "b", "--limit", "few"), "--limit"),
    ],
)
def test_wrong_options(arguments, said):
    text = refused(*arguments)
    assert said in text
    assert text.endswith(f"; see workbench {arguments[0]} --help")
    assert not set("│╭╰─") & set(text)
    assert "----" not in text
    assert refused(*arguments, encoding="ascii") == text


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("record",), "--out PATH"),
        (("record", "m", "t"), "--out PATH"),
        (("query", "a"), "predicate"),
        (("info",), "PATH"),
    ],
)
def test_missing_arguments(arguments, missing):
    text = refused(*arguments)
    assert missing in text or "For example \"token = ' Monday'" in text
    assert text.endswith(f"; see workbench {arguments[0]} --help")


def test_no_text(stories260k, tmp_path):
    assert refused("record", stories260k, "--out", tmp_path / "acts") == (
        "no text given; name a file (.txt, .jsonl, .parquet), hf:NAME, or quote a text"
    )


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
        f"tokenizer {str(tmp_path / 'words')!r}: no such directory ({tmp_path.name}/ has no 'words')"
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
    columns = "row, sequence, position, document, token_id, token, char_start, char_end, is_special"
    assert refused("query", store, "tokn = 3") == (
        f"query 'tokn = 3': Referenced column \"tokn\" not found in FROM clause; columns: {columns}; "
        "nearest: token, token_id"
    )
    assert refused("query", store, "position >").startswith("query 'position >': syntax error")
    assert refused("query", store, " ").startswith("query is empty; ")
    assert refused("query", store, "position = 0", "--limit", -1) == "limit must be at least 0, not -1"


def test_wrong_requests_of_a_probe(store, tmp_path):
    out = ("--out", tmp_path / "lens")
    assert refused("probe", "logit-len", store, *out).startswith(
        "probe 'logit-len' is not installed; nearest: logit-lens, "
    )
    assert refused("probe", "logit-lens", store).startswith("Missing from workbench probe logit-lens: --out PATH")
    assert refused("probe", "logit-lens", store, *out, "--zork").startswith("Unrecognized options: --zork; ")
    assert "top_k must be at least 1, not 0" in refused("probe", "logit-lens", store, *out, "--top-k", 0)
    assert refused("probe", "logit-lens", store, *out, "--top-k", 600) == (
        "top_k is 600 and the vocabulary has 512; give at most that"
    )
    assert refused("probe", "logit-lens", store, *out, "--site", "z").startswith(f"z.0 is not recorded in {store}; ")
    assert not (tmp_path / "lens").exists()


def test_a_taken_out_is_refused_before_the_probe_runs(store, tmp_path, monkeypatch):
    (tmp_path / "mine").touch()
    monkeypatch.setattr("probes.LogitLens.run", lambda *_arguments: pytest.fail("ran"))
    assert refused("probe", "logit-lens", store, "--out", tmp_path) == (
        f"out {str(tmp_path)!r} exists and is no result; choose another folder"
    )


# Help


def test_help_lists_every_verb():
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert run() == run("-h") == run("help") == (0, out, "")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    verbs = "demo record plan info verify query features top probes report export compare probe sweep"
    assert listed == verbs.split()
    assert {*cli.VERBS, "probe", "sweep"} == set(listed)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ("record",),
            ("--sites", "--context", "--dtype", "--bos", "--max-rows", "--append", "--allow-pickle", "--out"),
        ),
        (("query",), ("--limit", "predicate")),
        (("probe", "logit-lens"), ("--site", "--where", "--top-k", "--detail", "--device", "--out")),
    ],
)
def test_help_of_a_verb_names_every_setting(arguments, named):
    code, out, err = run(*arguments, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: workbench {' '.join(arguments)} ")
    assert [name for name in named if name not in out.lower()] == []


def test_help_of_probe_lists_the_probes():
    for arguments in ((), ("--help",), ("-h",)):
        code, out, _ = run("probe", *arguments)
        assert code == 0
        assert "workbench probe NAME STORE --out DIR" in out
        assert "logit-lens" in out


# Surprises


def test_debug_raises():
    with pytest.raises(wb.RequestError, match="there is no command 'zork'"):
        cli.main(["zork", "--debug"])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ZeroDivisionError("a\nb\x1b[31m"), 1, "unexpected ZeroDivisionError: a b\\x1b[31m; --debug shows where"),
        (MemoryError(), 1, "unexpected MemoryError: no message; --debug shows where"),
        (wb.DataError("torn"), 1, "torn"),
        (wb.RequestError("\x1b[2J"), 2, "\\x1b[2J"),
        (KeyboardInterrupt(), 130, "interrupted; what is committed stays, and the same command resumes"),
    ],
)
def test_whatever_goes_wrong_is_one_line(error, code, said, monkeypatch):
    def fail(_self):
        raise error

    monkeypatch.setattr(cli.Probes, "run", fail)
    assert run("probes") == (code, "", f"workbench: {said}\n")
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            cli.main(["probes", "--debug"])


def test_what_reads_our_output_may_go_away(store):
    for limit in (1, 3_000):  # what fits in a pipe, and what does not
        command = [sys.executable, "-c", MAIN, "query", str(store), "position >= 0", "--limit", str(limit)]
        ran = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
        ran.stdout.close()
        assert ran.stderr.read() == b""
        ran.stderr.close()
        assert ran.wait(60) == 0


def test_what_tokens_hold_does_not_reach_the_terminal(tiny_models, tmp_path):
    names = ["\x1b[31mred", "\x9b2J", "a\nb\r", "\u202eevil", "\u0007", "wide日本", *(f"t{i}" for i in range(314))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="t0"))
    backend.decoder = decoders.Fuse()
    model = Model(tiny_models["llama"], PreTrainedTokenizerFast(tokenizer_object=backend), "m\x1b[31m")
    out = tmp_path / "acts"
    wb.record(model, [[0, 1, 2, 3, 4, 5]], out=out, show_progress=False)
    said = [run("info", out), run("query", out, "true"), run("verify", out)]
    said += [run("probe", "logit-lens", out, "--out", tmp_path / "lens"), run("query", out, "\x1b[31m")]
    text = "".join(part for _, *parts in said for part in parts)
    assert {char for char in text if not char.isprintable()} == {"\n"}
    assert all(name in text for name in ("\\x1b[31mred", "\\x9b2J", "a\\nb\\r", "\\u202eevil", "\\x07", "wide日本"))


def test_long_values_are_cut(tiny_models, tmp_path):
    out = tmp_path / "acts"
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"input_ids": [5, 6], "note": "x" * 100}))
    wb.record(tiny_models["llama"], texts, out=out, show_progress=False)
    line = run("query", out, "row = 0")[1].splitlines()[1]
    assert line.endswith("'" + "x" * 38 + "…")


def test_a_wrong_path_answers_before_anything_heavy_is_loaded(store, stories, tmp_path):
    """Also within two seconds, which is most of what importing torch takes."""
    code = f"""
import contextlib, io, json, sys, time
began = time.process_time()
from workbench.cli.main import main
requests = {{
    "model": ["record", {str(tmp_path / "nowhere")!r}, {str(stories)!r}, "--out", "o"],
    "hub": ["record", "some/model", {str(stories)!r}, "--out", "o"],
    "text": ["record", {str(tmp_path)!r}, {str(tmp_path / "nowhere.txt")!r}, "--out", "o"],
    "info": ["info", "nowhere"],
    "verify": ["verify", "nowhere"],
    "query": ["query", "nowhere", "true"],
    "predicate": ["query", {str(store)!r}, "zork"],
    "probe": ["probe", "logit-lens", "nowhere", "--out", "o"],
    "unknown probe": ["probe", "zork", {str(store)!r}, "--out", "o"],
    "verb": ["zork"],
    "help": ["--help"],
    "probes": ["probes"],
    "good info": ["info", {str(store)!r}],
    "good query": ["query", {str(store)!r}, "row = 0"],
}}
codes = {{}}
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for name, request in requests.items():
        try:
            main(request)
        except SystemExit as stop:
            codes[name] = stop.code
heavy = [name for name in ("torch", "transformers", "transformer_lens", "plotly", "xarray") if name in sys.modules]
print(json.dumps([codes, heavy, time.process_time() - began]))
"""
    ran = process(code, cwd=tmp_path)
    assert ran.stderr == ""
    codes, heavy, seconds = json.loads(ran.stdout)
    good = {"help", "probes", "good info", "good query"}
    assert codes == {name: 0 if name in good else 2 for name in codes}
    assert len(codes) == 14
    assert heavy == []
    assert seconds < 4  # all fourteen together


# Probes of others


def test_a_broken_probe_of_others_hides_no_other(monkeypatch):
    entries = [
        EntryPoint("gone", "no_such_package.probe:Probe", "workbench.probes"),
        EntryPoint("logit-lens", "workbench.probes.logit_lens:LogitLens", "workbench.probes"),
    ]
    monkeypatch.setattr("workbench.results.registry.entry_points", lambda group: entries)
    code, out, err = run("probes")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "  gone             cannot be loaded: there is no module no_such_package.probe"
    assert out.splitlines()[1].startswith("  logit-lens       What each layer")
