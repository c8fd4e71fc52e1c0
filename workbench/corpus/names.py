"""Names of metadata columns and labels that the token table and SQL can hold."""

from __future__ import annotations

from workbench.corpus.places import NEXT, PLACE_SCHEMA
from workbench.corpus.tokenizer import TOKEN_SCHEMA

_CONSTANTS = ("true", "false", "null")


def refused_name(name: str) -> str | None:
    """Returns the reason why a column of the token table cannot have this name, None where it can.

    Names that differ by case alone are different columns, for queries too. A reserved word such as `group` is a name
    that conditions write in double quotes.
    """
    if name in (*TOKEN_SCHEMA.names, *PLACE_SCHEMA.names, NEXT):
        return "a column of the token table"
    if name.lower() in _CONSTANTS:
        return "a constant of SQL"
    if not name or "\0" in name:
        return "no name of a column in SQL"
    return None
