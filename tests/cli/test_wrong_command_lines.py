"""Wrong command lines over all verbs: each ends with exit code 2, or 1 for damaged data, and one line on stderr."""

from __future__ import annotations

import re
import shutil

import pytest
from command_line import run

import workbench as wb

LINES = """
    info
    info {store} {store}
    info {tmp}/nowhere
    info {store}/manifest.json
    info {tmp}
    info {damaged}
    info ''
    info --store {store}
    info /dev/null
    verify
    verify {tmp}/näher
    verify {tmp}/\\x1b[31mred
    query {store}
    query {store} ''
    query {store} 'tokn = 1'
    query {store} 'position >'
    query {store} "token = '"
    query {store} 'row = 0; drop table tokens'
    query {store} true --limit -1
    query {store} true --limit 1.5
    query {store} true --limit 1e400
    query {store} true --limit 99999999999999999999999999
    query {store} true --limit
    query {store} true --limit 3 --limit 4
    query {store} true --limt 3
    query {store} true extra
    record
    record demo
    record demo 'a text'
    record demo 'a text' --out
    record demo 'a text' --out ''
    record demo 'a text' --out {file}
    record demo 'a text' --out {tmp}/o --sites
    record demo 'a text' --out {tmp}/o --sites ''
    record demo 'a text' --out {tmp}/o --sites resid_pst
    record demo 'a text' --out {tmp}/o --sites resid_post.99
    record demo 'a text' --out {tmp}/o --sites resid_post.0:4:0
    record demo 'a text' --out {tmp}/o --sites blocks.9.hook_resid_post
    record demo 'a text' --out {tmp}/o --sites final_norm.1
    record demo --sites resid_post {file} --out {tmp}/o
    record demo 'a text' --out {tmp}/o --context 0
    record demo 'a text' --out {tmp}/o --context -5
    record demo 'a text' --out {tmp}/o --context many
    record demo 'a text' --out {tmp}/o --max-rows 1e6.5
    record demo 'a text' --out {tmp}/o --max-rows nan
    record demo 'a text' --out {tmp}/o --dtype int4
    record demo 'a text' --out {tmp}/o --model-dtype int8
    record demo 'a text' --out {tmp}/o --bos sometimes
    record demo 'a text' --out {tmp}/o --packed=yes
    record demo 'a text' --out {tmp}/o --no-append --append
    record demo 'a text' --out {tmp}/o --device tpu9
    record demo 'a text' --out {tmp}/o --threads 2
    record demo 'a text' --out {tmp}/o --share --workers 2
    record demo 'a text' --out {tmp}/o --sae-id x
    record demo 'a text' --out {tmp}/o --tokenizer {tmp}/nowhere
    record demo 'a text' --out {tmp}/o --metadata spans
    record demo {tmp}/nowhere.jsonl --out {tmp}/o
    record demo {tmp} --out {tmp}/o
    record demo {empty} --out {tmp}/o
    record demo once --out {tmp}/o
    record demo '' --out {tmp}/o
    record demo hf:a/b {file} --out {tmp}/o
    record demo hf: --out {tmp}/o
    record '' 'a text' --out {tmp}/o
    record {tmp} 'a text' --out {tmp}/o
    record {file} 'a text' --out {tmp}/o
    record {gguf} 'a text' --out {tmp}/o
    record {seq2seq} 'a text' --out {tmp}/o --sites resid_post
    record models/none 'a text' --out {tmp}/o
    plan demo
    plan demo --rows few
    plan demo --rows -1
    plan demo --rows 1e8 --sites resid_pst
    plan demo --rows 1e8 --workers 0
    features {store}
    features {store} --sae demo --sparsity topk
    features {store} --sae demo --k 3
    features {store} --sae {tmp}/nowhere
    features {store} --sae ''
    features {tmp} --sae demo
    match {store} {store} --k 0
    match {store} {store} --out {store}
    index {store} --out {tmp}/i --pages -3
    contributions {store} 3 --sae demo --k 0
    features {store} --sae neurons --site mlp_post.²
    generate demo {file} --out {file}
    generate demo 'a text' --out {tmp}
    atlas {store} --out {tmp}
    atlas {store} --out {tmp}/a.html --table {tmp}
    export {store} --out {store} --formats html
    sweep sinks --out {store}
    plan demo --rows 100 --seconds nan
    patch demo facts --out {tmp}/p --pairs 0
    demo --rows 0 --out {tmp}/d
    probe logit-lens {store} --out {tmp}/l --layers -99
    rm {store} --sites
    pack {store} {store}/inside
    top {store} 0
    top {tmp} 3
    top {store} first
    top {store} 0 --sae demo
    top {store} 0 --page {tmp}/p.html --where true
    probe nothing {store} --out {tmp}/l
    probe logit-lens
    probe logit-lens {store}
    probe logit-lens {tmp} --out {tmp}/l
    probe logit-lens {store} --out {tmp}/l --top-k 0
    probe logit-lens {store} --out {tmp}/l --top-k 1e9
    probe logit-lens {store} --out {tmp}/l --site nosite
    probe logit-lens {store} --out {tmp}/l --where 'nothing = 1'
    probe logit-lens {store} --out {store}
    probe logit-lens {store} --out {file}
    probe logit-lens {store} --out {file}/l
    probe logit-lens {store} --out {tmp}/l --device tpu9
    compare {store}
    compare {store} {tmp}
    compare {store} {store} --sites nosite
    compare {store} {store} --sites '' --probes
    compare {store} {store} --probes zork
    compare {store} {store} --out {store}
    report --out {tmp}/r.html
    report {tmp} --out {tmp}/r.html
    report {store} --out {tmp}
    report {file} --out {tmp}/r.html
    export {tmp}/nowhere --out {tmp}/e
    export {tmp} --out {tmp}/e --formats gif
    export {tmp} --out {tmp}/e --columns 3
    sweep zork
    sweep sinks --seed
    sweep sinks --seed a,b
    sweep sinks --weights untrained
    completion
    completion fish
    demo --out {file}
    demo now
    help zork
    zork
    recrod demo 'a text' --out {tmp}/o
    -x
    '--verbose'
    info {store} --\\u202e
"""


@pytest.fixture(scope="module")
def places(store, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("wrong")
    (tmp / "file.txt").write_text("a text")
    (tmp / "empty.txt").touch()
    (tmp / "m.gguf").write_bytes(b"GGUF")
    (tmp / "seq2seq").mkdir()
    (tmp / "seq2seq" / "config.json").write_text('{"is_encoder_decoder": true, "architectures": ["T5ForAll"]}')
    shutil.copytree(store, tmp / "damaged.acts")
    (tmp / "damaged.acts" / "manifest.json").write_text("[" * 100_000)
    names = {
        "file": "file.txt",
        "empty": "empty.txt",
        "gguf": "m.gguf",
        "seq2seq": "seq2seq",
        "damaged": "damaged.acts",
    }
    (tmp / "new").mkdir()
    return {"store": store, "tmp": tmp / "new"} | {name: tmp / place for name, place in names.items()}


def words(line: str, places: dict) -> list[str]:
    quoted = re.findall(r"'([^']*)'|\"([^\"]*)\"|(\S+)", line)
    line = [next(filter(None, parts), "") for parts in quoted]
    return [re.sub(r"\\(x1b|u202e)", lambda code: chr(int(code[1][1:], 16)), word).format(**places) for word in line]


@pytest.mark.parametrize("line", [line.strip() for line in LINES.strip().splitlines()])
def test_a_wrong_command_line_ends_in_one_line(line, places):
    code, out, err = run(*words(line, places))
    assert (code, out) == (1 if "damaged" in line else 2, "")
    assert re.fullmatch(r"workbench: [^\n]{10,900}\n", err)
    assert all(char.isprintable() for char in err[:-1])
    assert "unexpected" not in err.replace("unexpected argument", "")
    assert "Error" not in err
    assert not re.search(
        r"\w=['\"\[(]|=(True|False|None)\b|<class|\b[a-z]+_[a-z]+ must be|pass \[", err
    )  # Python's spelling
    assert list(places["tmp"].iterdir()) == []  # nothing is left behind


def test_a_kind_of_site_is_asked_for_its_layer(store):
    with pytest.raises(wb.RequestError) as caught:
        wb.open_store(store)["resid_post"]
    assert str(caught.value) == f"resid_post is recorded by layer in {store}; name one, such as resid_post.0"
