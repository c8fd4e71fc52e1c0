"""Tests of chats: the tokens are those of the template's text, and each content is found in any template."""

import json
import tempfile

import numpy as np
import pytest
from corpus_example import APPENDS_EOS, BYTE_LEVEL, table
from refusals import refused
from transformers import AutoTokenizer
from warned import warned

import workbench as wb
from workbench.corpus.chats import render_chats
from workbench.corpus.layout import Layout, plan_sequences
from workbench.corpus.sources import read_documents
from workbench.corpus.tokenizer import added_tokens
from workbench.io.errors import RequestError

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the user in the user"},
    {"role": "assistant", "content": "in"},
    {"role": "user", "content": "assistant\n"},
]

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BEGINS = "<s>" + PLAIN
TRIMS = "{% for m in messages %}[{{ m['role'] | upper }}] {{ m['content'] | trim }} {% endfor %}"
DEFAULT = "{% if messages[0].role != 'system' %}<system>the user in the end</>{% endif %}" + PLAIN
MERGES = (
    "{% set first = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}[{{ '(' + first + ')' if loop.index == 2 else '' }}{{ m.content }}]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('only system, user and assistant, not ' + m.role) }}{% endif %}{{ m.role[0] }}{{ m.content }}"
    "{% endfor %}"
)
REWRITES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "{% endfor %}"
)
ESCAPES = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
DROPS = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }};{% endif %}{% endfor %}"


def plan(chats, template, tokenizer=BYTE_LEVEL, *, bos="model", context=512, generation_prompt=False, packed=False):
    tokenizer.chat_template = template
    documents = render_chats(read_documents(chats), tokenizer, generation_prompt)
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(context, added_tokens(tokenizer, bos), packed)
        return plan_sequences(documents, tokenizer, layout, folder)


def contents(sequences, text):
    """Role, turn and characters of each run of tokens of one message."""
    frame = table(sequences).to_pandas()
    runs = (frame["turn"] != frame["turn"].shift()).cumsum()
    spoken = frame[frame["turn"].notna()]
    return [
        (run["role"].iloc[0], int(run["turn"].iloc[0]), text[run["char_start"].min() : run["char_end"].max()])
        for _, run in spoken.groupby(runs)
    ]


def templates_text(tokenizer, chat, generation_prompt=False):
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation_prompt)


@pytest.mark.parametrize("template", [PLAIN, BEGINS, DEFAULT, MERGES, STRICT])
@pytest.mark.parametrize("generation_prompt", [False, True])
def test_the_tokens_are_the_templates_and_each_content_has_its_role_and_turn(template, generation_prompt):
    tokenizer = APPENDS_EOS  # it would add its own EOS, and a BOS if asked
    for chat in (CHAT, CHAT[1:]):
        sequences = plan(chat, template, tokenizer, bos="always", generation_prompt=generation_prompt)
        text = templates_text(tokenizer, chat, generation_prompt)
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=generation_prompt, return_dict=False)
        assert sequences.token_ids.tolist() == ids
        turns = [(m["role"], n, m["content"]) for n, m in enumerate(chat)]
        order = sorted(turns, key=lambda part: (text.find(f"({part[2]})") + 1 or text.find(part[2] + "</>"), part[1]))
        assert sorted(contents(sequences, text)) == sorted(order)


def test_a_real_tokenizer_and_its_own_template(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": " Hi\nuser "}, {"role": "assistant", "content": "assistant"}]
    sequences = plan([chat, chat[:1]], tokenizer.chat_template, tokenizer, bos="always")
    first, second = np.split(sequences.token_ids, sequences.starts[1:-1])
    assert first.tolist() == tokenizer.apply_chat_template(chat, return_dict=False)
    assert second.tolist() == tokenizer.apply_chat_template(chat[:1], return_dict=False)
    frame = table(sequences, tokenizer).to_pandas()
    spoken = frame[frame["document"] == 0].dropna(subset="role").groupby("turn")["token"].agg("".join)
    assert spoken.tolist() == [" Hi\nuser ", "assistant"]


def test_what_a_template_changes_is_reported_and_marked_where_it_is_found():
    chat = [{"role": "user", "content": "  two words "}, {"role": "assistant", "content": "<think>x</think> yes"}]
    with warned("trims 2 messages; the first is message 0 of document 0"):
        sequences = plan([chat[:1], [{"role": "user", "content": "\nin "}]], TRIMS)
    assert contents(sequences, "[USER] two words ")[0][2].strip() == "two words"
    with warned("rewrites 1 messages, whose role and turn mark what it makes of them; the first is message 1"):
        sequences = plan(chat, REWRITES)
    text = templates_text(BYTE_LEVEL, chat)
    assert contents(sequences, text) == [("user", 0, "  two words "), ("assistant", 1, " yes")]
    quoted = [{"role": "user", "content": 'say "in"'}]
    with warned("rewrites 1 messages"):
        sequences = plan(quoted, ESCAPES)
    assert contents(sequences, templates_text(BYTE_LEVEL, quoted))[0][2] == json.dumps('say "in"')[1:-1]


def test_a_chat_longer_than_the_context_is_continued_and_keeps_its_turns():
    whole = plan(CHAT, BEGINS, APPENDS_EOS, bos="always")
    cut = plan(CHAT, BEGINS, APPENDS_EOS, bos="always", context=20)
    bos = APPENDS_EOS.bos_token_id
    pieces = np.split(cut.token_ids, cut.starts[1:-1])
    assert all(piece[0] == bos for piece in pieces), "the continuation begins as the chat does"
    content = cut.token_ids != bos
    assert cut.token_ids[content].tolist() == whole.token_ids[1:].tolist()
    assert cut.labels["turn"][content].tolist() == whole.labels["turn"][1:].tolist()


@pytest.mark.parametrize(
    ("texts", "template", "message"),
    [
        (
            [CHAT, "text"],
            PLAIN,
            "document 1 (texts[1]) is a text or token ids, and each document before it a chat",
        ),
        (
            ["text", CHAT],
            PLAIN,
            "document 1 (texts[1]) is a chat, and each document before it a text or token",
        ),
        ([[1, 2], {"messages": CHAT}], PLAIN, "document 1 (texts[1]) is a chat, and each"),
        ([CHAT], None, "document 0 is a chat and the tokenizer has no chat template; set tokenizer.chat_template"),
        (
            [CHAT, [{"role": "critic", "content": "x"}]],
            STRICT,
            "document 1: the chat template refuses the chat (only system, user and assistant, not critic)",
        ),
        (CHAT, DROPS, "document 0: the chat template leaves out message 0 (role 'system'); leave it out of the chat"),
        ([[{"from": "human", "value": "x"}]], PLAIN, "document 0: message 0 has the keys from, value; a message is"),
        ([{"messages": CHAT, "turn": 3}], PLAIN, "document 0 has a column 'turn', which its tokens have, too; rename"),
    ],
)
def test_a_chat_that_cannot_be_recorded_is_refused_in_a_line(texts, template, message):
    assert refused(RequestError, lambda: plan(texts, template)).startswith(message)


def test_chats_come_from_files_and_columns(tmp_path):
    expected = plan(CHAT, PLAIN).token_ids.tolist()
    for name, value in {
        "one.json": CHAT,
        "list.json": [CHAT],
        "columns.json": [{"messages": CHAT, "source": "a"}],
        "lines.jsonl": CHAT,
        "columns.jsonl": {"messages": CHAT},
        "renamed.jsonl": {"text": CHAT},
    }.items():
        file = tmp_path / name
        file.write_text(json.dumps(value) + "\n")
        assert plan(file, PLAIN).token_ids.tolist() == expected, name
    assert plan({"messages": CHAT}, PLAIN).token_ids.tolist() == expected
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    by_parts = PLAIN.replace("m.content", "m.content[0].text")
    sequences = plan(parts, by_parts)
    assert sequences.token_ids.tolist() == expected
    assert sequences.labels["turn"].tolist() == plan(CHAT, PLAIN).labels["turn"].tolist()


def test_the_header_of_the_next_message_is_refused_for_a_text():
    model = wb.load_model("demo")
    with pytest.raises(RequestError, match=r"^document 0 is no chat, and generation_prompt=True ends chats with"):
        wb.record(model, ["One day"], sites="resid_post.0", generation_prompt=True, show_progress=False)
