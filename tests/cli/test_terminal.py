"""Tables on the terminal."""

from __future__ import annotations

from workbench.cli.terminal import print_table


def test_texts_are_quoted_except_in_a_column_of_plain_names(capsys):
    lines = [("loss_clean", " the", "a"), ("kl score", "w", "7"), ("no\u202eisy", "the", "b")]
    print_table(["metric", "token", "text"], lines[:2])
    assert capsys.readouterr().out.splitlines() == [
        "metric      token   text",
        "loss_clean  ' the'  'a'",
        "kl score    'w'     '7'",
    ]
    print_table(["metric", "token", "text"], lines[2:])
    assert capsys.readouterr().out.splitlines()[1] == "'no\\u202eisy'  the    b"
