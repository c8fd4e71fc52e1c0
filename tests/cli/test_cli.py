"""Tests of the command line on real input; every error is one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from command_line import ENVIRONMENT, MAIN, process, run
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import workbench as wb
from workbench.cli import main as cli
from workbench.cli.probe_verbs import Probes
from workbench.cli.verbs import VERBS
from workbench.model.load import Model

CUT = "10 documents cut into several sequences"

# The whole way


def test_record(recorded, stories260k, stories):
    store, (code, out, err) = recorded
    assert (code, err) == (0, f"texts of {store}: {CUT}\n")
    opened = wb.open_store(store)
    assert out == (
        f"store    {store}\n"
        "model    stories260K (LlamaForCausalLM, 5 layers, d_model 64)\n"
        "sites    5: resid_post.0 (64,) float16, resid_post.1 (64,) float16, resid_post.2 (64,) float16, "
        "resid_post.3 (64,) float16, resid_post.4 (64,) float16\n"
        f"rows     {opened.rows:,} in 1 segment (complete)\n"
        f"texts    10 documents, {len(set(opened.tokens['sequence'].to_pylist()))} sequences, 1 part\n"
        "unembed  yes\n"
        f"notes    {CUT}\n"
    )
    text = json.loads(stories.read_text().splitlines()[0])["text"]
    first = wb.load_model(stories260k).tokenizer(text)["input_ids"][:256]
    assert opened.tokens["token_id"].to_pylist()[:256] == first
    assert run("record", stories260k, stories, "--out", store) == (0, out, err)  # there already


def test_info(recorded):
    store, (_, recorded_out, _) = recorded
    assert run("info", store) == (0, recorded_out, "")


def test_verify(store, tmp_path):
    note = f"note   manifest.json: changed texts: {CUT}\n"
    assert run("verify", store) == (0, f"{note}0 errors, 1 note\n", "")
    damaged = Path(shutil.copytree(store, tmp_path / "damaged"))
    file = damaged / "segments" / "00000" / "resid_post.3.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code, out, err = run("verify", damaged)
    assert (code, err) == (1, "")
    *findings, last = out.splitlines()
    assert last == "1 error, 1 note"
    assert findings[1].startswith("error  00000/resid_post.3.safetensors: ")


def test_query(store):
    code, out, err = run("query", store, "token = ' Lily' AND position > 0", "--limit", 2)
    rows = wb.open_store(store).where("token = ' Lily' AND position > 0")
    assert (code, err) == (0, "")
    heading, *lines, count = out.splitlines()
    names = ["row", "sequence", "position", "document", "token_id", "token", "char_start", "char_end", "is_special"]
    assert heading.split() == [*names, "sequence_length", "position_from_end", "is_last"]
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
    code, stdout, err = run("probe", "logit-lens", store, "--out", out, "--top-k", 2, "--where", "position < 5")
    result = wb.load_result(out)
    assert (code, err) == (0, "")
    assert stdout.splitlines() == [
        wb.load_result(out).headline(),
        f"figure  {out}/figures/by_layer.html",
        f"figure  {out}/figures/depth.html",
        f"figure  {out}/figures/grid.html",
    ]
    assert result.provenance["settings"] == {
        "allow_nonfinite": False,
        "layers": None,
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
        "activation-patching",
        "active-dormant",
        "attention-calibration",
        "attention-sinks",
        "attribution-patching",
        "direct-logit-attribution",
        "edge-attribution",
        "feed-forward-maps",
        "fiber-bundle",
        "function-vectors",
        "future-lens",
        "future-prompts",
        "head-ablation",
        "hidden-sinks",
        "induction-heads",
        "jacobian-lens",
        "linear-probes",
        "logit-lens",
        "mask-positions",
        "masked-sinks",
        "massive-activations",
        "neurons",
        "next-token-law",
        "over-squashing",
        "path-patching",
        "relative-contextualization",
        "representation-hijacking",
        "residual-uncertainty",
        "semantic-axes",
        "similarity",
        "stages",
        "steering",
        "successor-heads",
        "token-characters",
        "token-erasure",
        "token-geometry",
        "token-microscope",
        "tuned-lens",
        "under-trained-tokens",
        "value-aware-importance",
        "vocabulary-keys",
        "zero-tuning",
    ]
    assert [line.split()[0] for line in lines] == names
    assert lines[names.index("logit-lens")] == (
        "  logit-lens                  Reads every layer through the model's unembedding: top tokens, entropy, KL to "
        "the model's output, loss."
    )


def test_the_command_in_a_shell(store, tmp_path):
    """Real processes: as installed, the exit code and the two streams are the system's."""
    result = process(MAIN, "query", store, "position = 0", "--limit", "1")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[1].startswith("0    0         0         0         1         '<s>'")
    result = process(MAIN, "verify", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"workbench: {tmp_path} is no store, features, result, run or sweep; name the folder of one\n"
    )


# What is asked of a recording


def test_settings_of_a_recording(stories260k, stories, tmp_path):
    out = tmp_path / "acts"
    code, _, err = run(
        *("record", stories260k, stories, "--out", out, "--sites", "resid_post.1:3", "blocks.0.attn.hook_z"),
        *("--context", 32, "--dtype", "bfloat16", "--bos", "never", "--packed", "--max-rows", 100),
        *("--segment-rows", 64, "--batch-tokens", 64, "--metadata"),
    )
    assert (code, err) == (0, f"texts of {out}: 1 document cut into several sequences\n")
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
    code, stdout, _ = run("record", stories260k, "The end of it", "--out", out, "--append")
    assert code == 0
    assert "2 documents, 2 sequences, 2 parts" in stdout


def test_sites_are_added_from_the_tokens_of_the_store(stories260k, tmp_path):
    store = tmp_path / "acts"
    for text, more in (("Once upon a time", ()), ("a big dog", ("--append",))):
        assert (
            run("record", stories260k, text, "--sites", "resid_post.1", "--dtype", "float32", "--out", store, *more)[0]
            == 0
        )
    code, out, err = run("add", store, "--sites", "z.0", "ln1.1", "--model", stories260k)
    assert (code, err) == (0, "")
    assert "sites    3: " in out
    grown = wb.open_store(store)
    assert [site.short for site in grown.manifest.sites] == ["z.0", "ln1.1", "resid_post.1"]
    assert {site.dtype for site in grown.manifest.sites} == {"float32"}
    both = wb.record(
        stories260k, ["Once upon a time", "a big dog"], sites="z.0", dtype="float32", out=tmp_path / "both"
    )
    torch.testing.assert_close(grown["z.0"][:], both["z.0"][:], atol=1e-5, rtol=1e-5)
    assert run("add", store, "--sites", "z.0")[2].startswith("workbench: --model is not given, and 'stories260K'")
    assert "no store at" in run("add", tmp_path / "none", "--sites", "z")[2]


def test_no_site_is_added_to_chosen_rows_or_to_a_changed_model(stories260k, tmp_path):
    changes = tmp_path / "changes.json"
    changes.write_text('{"records": [{"kind": "zero", "site": "z.0"}]}')
    cases = {
        "holds chosen rows alone": ("--keep", "last"),
        "was recorded with interventions": ("--interventions", changes),
    }
    for number, (reason, options) in enumerate(cases.items()):
        store = tmp_path / f"{number}.acts"
        assert run("record", stories260k, "Once upon a time", "--sites", "resid_post", "--out", store, *options)[0] == 0
        assert run("add", store, "--sites", "z", "--model", stories260k)[2] == (
            f"workbench: {store} {reason}, so no site can be added to it; record it anew with all sites that are "
            "needed, into another out\n"
        )
        with pytest.raises(wb.RequestError, match=f"which {reason}, so that no site can be added; .*record it anew"):
            wb.open_store(store)["z.1"]


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


# Surprises


def test_debug_raises():
    with pytest.raises(wb.RequestError, match="unknown command 'zork'"):
        cli.main(["zork", "--debug"])


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            ZeroDivisionError("a\nb\x1b[31m"),
            1,
            "unexpected ZeroDivisionError: a b\\x1b[31m; --debug shows the traceback",
        ),
        (MemoryError(), 1, "unexpected MemoryError: no message; --debug shows the traceback"),
        (wb.DataError("torn"), 1, "torn"),
        (wb.RequestError("\x1b[2J"), 2, "\\x1b[2J"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_whatever_goes_wrong_is_one_line(error, code, message, monkeypatch):
    def fail(_self):
        raise error

    monkeypatch.setattr(Probes, "run", fail)
    assert run("probes") == (code, "", f"workbench: {message}\n")
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            cli.main(["probes", "--debug"])


def test_an_interrupt_while_modules_are_imported(store):
    """It comes out of an import as another error, or not at all; the process ends at once instead."""
    code = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "duckdb":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except BaseException:
                raise ImportError("as an extension module makes of it")
sys.meta_path.insert(0, Interrupting())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
from workbench.cli.main import main
main()
"""
    result = process(code, "query", store, "true")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "workbench: interrupted\n")


@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("record", "interrupted; committed segments are kept, and the same command resumes"),
        ("info", "interrupted"),
    ],
)
def test_resuming_is_promised_where_it_is_true(verb, message, monkeypatch, tmp_path):
    def interrupt(_self):
        raise KeyboardInterrupt

    monkeypatch.setattr(VERBS[verb], "run", interrupt)
    words = ("demo", "a text", "--out", tmp_path / "o") if verb == "record" else (tmp_path,)
    assert run(verb, *words) == (130, "", f"workbench: {message}\n")


def test_any_character_is_printed_on_any_terminal(tmp_path):
    folder = tmp_path / "stör\x1b[31m\n日"
    folder.mkdir()
    wb.record("demo", ["Anna saw naïve 日本"], out=folder / "a.acts", show_progress=False)
    for arguments in (("info", folder / "a.acts"), ("query", folder / "a.acts", "true"), ("verify", folder / "b.acts")):
        code, out, err = run(*arguments, encoding="ascii")
        assert (code, bool(out)) == ((2, False) if arguments[0] == "verify" else (0, True))
        assert set(out + err) <= {*map(chr, range(32, 127)), "\n"}
        assert err.count("\n") == (arguments[0] == "verify")
    assert "\\u65e5" in run("info", folder / "a.acts", encoding="ascii")[1]


def test_closed_streams_are_no_error(store):
    command = f'exec "$0" -c "{MAIN}" "$@"'
    for closed, code in ((">&-", 0), ("2>&-", 0), (">&- 2>&-", 2)):
        words = ["query", store, "position = 0"] if code == 0 else ["query", store, "zork"]
        result = subprocess.run(
            ["bash", "-c", f"{command} {closed}", sys.executable, *map(str, words)],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (code, "")


def test_what_reads_our_output_may_go_away(store):
    for limit in (1, 3_000):  # what fits in a pipe, and what does not
        command = [sys.executable, "-c", MAIN, "query", str(store), "position >= 0", "--limit", str(limit)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
        child.stdout.close()
        assert child.stderr.read() == b""
        child.stderr.close()
        assert child.wait(60) == 0


def test_what_tokens_hold_does_not_reach_the_terminal(tiny_models, tmp_path):
    names = ["\x1b[31mred", "\x9b2J", "a\nb\r", "\u202eevil", "\u0007", "wide日本", *(f"t{i}" for i in range(314))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="t0"))
    backend.decoder = decoders.Fuse()
    model = Model(tiny_models["llama"], PreTrainedTokenizerFast(tokenizer_object=backend), "m\x1b[31m")
    out = tmp_path / "acts"
    wb.record(model, [[0, 1, 2, 3, 4, 5]], out=out, show_progress=False)
    answers = [run("info", out), run("query", out, "true"), run("verify", out)]
    answers += [run("probe", "logit-lens", out, "--out", tmp_path / "lens"), run("query", out, "\x1b[31m")]
    text = "".join(part for _, *parts in answers for part in parts)
    assert {char for char in text if not char.isprintable()} == {"\n"}
    assert all(name in text for name in ("\\x1b[31mred", "\\x9b2J", "a\\nb\\r", "\\u202eevil", "\\x07", "wide日本"))


def test_long_values_are_cut(tiny_models, tmp_path):
    out = tmp_path / "acts"
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"input_ids": [5, 6], "note": "x" * 100}))
    wb.record(tiny_models["llama"], texts, out=out, show_progress=False)
    line = run("query", out, "row = 0")[1].splitlines()[1]
    assert line.endswith(" " + "x" * 39 + "…")


def test_a_wrong_path_answers_before_anything_heavy_is_loaded(store, stories, tmp_path):
    code = f"""
import contextlib, io, json, sys
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
known = ("torch", "transformers", "transformer_lens", "sae_lens", "datasets", "plotly", "scipy", "xarray")
heavy = [name for name in known if name in sys.modules]
print(json.dumps([codes, heavy]))
"""
    result = process(code, cwd=tmp_path)
    assert result.stderr == ""
    codes, heavy = json.loads(result.stdout)
    good = {"help", "probes", "good info", "good query"}
    assert codes == {name: 0 if name in good else 2 for name in codes}
    assert len(codes) == 14
    assert heavy == []


# Probes of others


def test_a_broken_probe_of_others_hides_no_other(monkeypatch):
    entries = [
        EntryPoint("gone", "no_such_package.probe:Probe", "workbench.probes"),
        EntryPoint("logit-lens", "workbench.probes.logit_lens:LogitLens", "workbench.probes"),
    ]
    monkeypatch.setattr("workbench.results.registry.entry_points", lambda group: entries)
    code, out, err = run("probes")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "  gone        cannot be loaded: there is no module no_such_package.probe"
    assert out.splitlines()[1].startswith("  logit-lens  Reads every layer")
