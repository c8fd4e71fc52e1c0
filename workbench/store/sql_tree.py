"""Parsed form of an SQL condition: it may read the token table, in subqueries too, and no other table or function."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from workbench.corpus.values import python_value
from workbench.io.errors import RequestError, shown

TABLE = "tokens"
"""Name of the token table in subqueries."""

Parameters: TypeAlias = Sequence[object] | Mapping[str, object]
"""Values of the placeholders of a condition: a sequence for `?`, a mapping for `$name`."""

_REFERENCES = ("BASE_TABLE", "JOIN", "SUBQUERY", "EMPTY", "EXPRESSION_LIST")


def parse_condition(connection: Any, condition: str) -> dict[str, Any]:
    """Returns the parsed form of a condition, or of its error, with the names of the columns in SQL.

    Args:
        connection: A connection to DuckDB, which parses.
        condition: The condition.
    """
    return _parsed(connection, f"SELECT 1 WHERE ({condition}\n)")


def allowed_clause(
    connection: Any, tree: dict[str, Any], predicate: str, condition: str, parameters: bool
) -> str | None:
    """Returns the clause of a SELECT that the condition needs; None where a plain filter serves.

    Args:
        connection: A connection to DuckDB, which parses the condition.
        tree: Its parsed form.
        predicate: The condition as it was given, for errors.
        condition: The condition with the names of the columns in SQL.
        parameters: True if values of placeholders are given.

    Raises:
        RequestError: A subquery of anything but the token table.
    """
    nodes = list(_nodes(tree))
    subquery = any(node.get("class") == "SUBQUERY" for node in nodes)
    window = any(node.get("class") == "WINDOW" for node in _nodes(tree, into_subqueries=False))
    if tree.get("error") or not (subquery or window or parameters):
        return None  # the filter gives the error of a condition that cannot be parsed
    complete = not _parsed(connection, f"SELECT [{condition}\n]").get("error")
    (statement, *more) = tree["statements"]
    plain = statement["node"].get("type") == "SELECT_NODE" and not statement["node"].get("modifiers")
    if more or not plain or not complete:
        raise RequestError(f"query {predicate!r}: more than a condition; give one over the columns of the token table")
    for node in nodes:
        if (node.get("cte_map") or {}).get("map"):
            raise RequestError(f"query {predicate!r}: WITH is not read; write the subquery in its place")
        if "from_table" in node and (name := _foreign(node["from_table"])):
            raise RequestError(f"query {predicate!r}: {name} in a subquery; the one table is {TABLE}")
    return f"{'QUALIFY' if window else 'WHERE'} ({condition}\n)"


def parameter_values(predicate: str, parameters: Parameters) -> Parameters:
    """Returns values of placeholders as DuckDB takes them: those of NumPy, pandas and torch as values of Python.

    Raises:
        RequestError: They are no list and no mapping; the text names the condition.
    """
    if isinstance(parameters, Mapping):
        return {name: _value(value) for name, value in parameters.items()}
    if isinstance(parameters, str | bytes) or not hasattr(parameters, "__iter__"):
        raise RequestError(
            f"query {predicate!r}: parameters must be a list of values, such as [' the'], or a mapping of names to "
            f"values, not {shown(parameters)}"
        )
    return [_value(value) for value in parameters]


def _value(value: Any) -> Any:
    value = python_value(value)
    return [_value(item) for item in value] if isinstance(value, list | tuple) else value


def check_placeholders(tree: dict[str, Any], predicate: str, parameters: Parameters) -> None:
    """Refuses a condition whose placeholders are others than the given values.

    Raises:
        RequestError: A placeholder has no value, or a value no placeholder.
    """
    placeholders = {node["identifier"] for node in _nodes(tree) if node.get("class") == "PARAMETER"}
    names = {*parameters} if isinstance(parameters, Mapping) else {str(n + 1) for n in range(len(parameters))}
    if tree.get("error") or placeholders == names:
        return
    absent, unused = (", ".join(sorted(rest)) for rest in (placeholders - names, names - placeholders))
    found = f"no value for placeholder {absent}" if absent else f"no placeholder for value {unused}"
    raise RequestError(
        f"query {predicate!r}: {found}; give parameters, one value for each ? or {{name: value}} for $name"
    )


def check_repeatable(connection: Any, tree: dict[str, Any], predicate: str) -> None:
    """Refuses a condition that may choose other tokens each time, as a recording and what resumes it must not.

    Raises:
        RequestError: It calls a function such as random() or now().
    """
    changing = "SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT'"
    names = {name for (name,) in connection.execute(changing).fetchall()}
    for node in _nodes(tree):
        if (name := node.get("function_name")) in names:
            raise RequestError(
                f"query {predicate!r}: {name}() may choose other tokens each time, and the same request must record "
                "the same tokens; choose by columns, such as row % 10 = 0"
            )


def _parsed(connection: Any, statement: str) -> dict[str, Any]:
    ((tree,),) = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [statement]).fetchall()
    return json.loads(tree)


def _nodes(value: Any, into_subqueries: bool = True) -> Iterator[dict[str, Any]]:
    """All objects of a parsed statement."""
    if isinstance(value, dict):
        yield value
        if not into_subqueries and value.get("class") == "SUBQUERY":
            return
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(part, into_subqueries)


def _foreign(reference: Any) -> str | None:
    """A name of what a FROM clause reads beside the token table and subqueries; None: nothing."""
    if not isinstance(reference, dict) or reference.get("type") not in _REFERENCES:
        kind = reference.get("type") if isinstance(reference, dict) else None
        return f"a {str(kind or 'part').lower().replace('_', ' ')}"
    if reference["type"] == "BASE_TABLE":
        path = [part for part in (reference.get("catalog_name"), reference.get("schema_name")) if part]
        name = ".".join([*path, str(reference.get("table_name"))])
        return None if name.lower() == TABLE and not reference.get("at_clause") else f"the table {name!r}"
    return next((name for side in ("left", "right") if side in reference and (name := _foreign(reference[side]))), None)
