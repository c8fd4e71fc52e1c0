"""Tests of predicates from a stranger: they see the tokens of this store and no file, setting or table besides."""

import pytest
from refusals import refused
from store_example import contents, write_store

from workbench.io.errors import RequestError
from workbench.store.manifest import read_manifest
from workbench.store.query import select_rows

READ = """
SELECT b FROM read_csv('{secret}')|SELECT count(*) FROM read_csv_auto('{secret}')|SELECT count(*) FROM '{secret}'
SELECT content FROM read_text('{secret}')|SELECT size FROM read_blob('{secret}')
SELECT count(*) FROM read_json('{secret}')|SELECT count(*) FROM read_json_auto('{secret}')
SELECT count(*) FROM read_json_objects('{secret}')|SELECT count(*) FROM read_ndjson('{secret}')
SELECT count(*) FROM sniff_csv('{secret}')|SELECT count(*) FROM glob('/etc/*')
SELECT count(*) FROM read_parquet('{tokens}')|SELECT count(*) FROM parquet_scan('{tokens}')
SELECT count(*) FROM '{tokens}'|SELECT count(*) FROM parquet_metadata('{tokens}')
SELECT count(*) FROM parquet_schema('{tokens}')|SELECT count(*) FROM parquet_file_metadata('{tokens}')
SELECT count(*) FROM parquet_kv_metadata('{tokens}')|SELECT count(*) FROM read_text('/etc/passwd')
SELECT count(*) FROM read_text('{store}/segments/../../secret.csv')|SELECT count(*) FROM 'https://example.org/x.csv'
SELECT count(*) FROM read_csv('https://example.org/x.csv')|SELECT count(*) FROM read_parquet('s3://bucket/x.parquet')
SELECT count(*) FROM read_parquet('{mine}')|SELECT count(*) FROM duckdb_settings()
SELECT count(*) FROM duckdb_secrets()|SELECT count(*) FROM which_secret('x', 's3')
SELECT count(*) FROM duckdb_tables()|SELECT count(*) FROM duckdb_extensions()
SELECT count(*) FROM information_schema.tables|SELECT count(*) FROM pragma_version()
SELECT count(*) FROM pragma_database_list()|SELECT count(*) FROM duckdb_logs()|SELECT count(*) FROM query('SELECT 1')
SELECT count(*) FROM query_table('x')|SELECT count(*) FROM duckdb_memory()
SELECT count(*) FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))|SELECT count(*) FROM read_manifest
SELECT count(*) FROM range(10)|SELECT count(*) FROM tokens, range(10)
SELECT count(*) FROM tokens t JOIN '{tokens}' u USING (row)
SELECT 1 FROM tokens WHERE EXISTS (SELECT 1 FROM duckdb_settings())|SELECT count(*) FROM memory.main.tokens
SELECT count(*) FROM main.tokens|WITH tokens AS (SELECT 1) SELECT count(*) FROM tokens
(SELECT 1 UNION ALL SELECT count(*) FROM duckdb_tables())
WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t
"""
STATEMENTS = """
DROP TABLE x|SELECT 1|ATTACH '{new}' AS d|COPY (SELECT 1) TO '{new}'|INSTALL httpfs|LOAD httpfs
SET enable_external_access = true|RESET ALL|PRAGMA database_list|PRAGMA enable_profiling|CREATE TABLE t(a int)
EXPORT DATABASE '{new}'|IMPORT DATABASE '{new}'|CALL pragma_version()|CHECKPOINT|DETACH memory|USE memory|VACUUM
INSERT INTO tokens VALUES (1)|UPDATE tokens SET a = 1|DELETE FROM tokens|EXPLAIN SELECT 1|DESCRIBE tokens|SHOW TABLES
SUMMARIZE tokens|PREPARE p AS SELECT 1|BEGIN|COMMENT ON TABLE tokens IS 'x'
"""
CLAUSES = """
true ORDER BY position|true LIMIT 1|true GROUP BY position|true UNION SELECT 1|true HAVING 1|true WINDOW w AS ()
true) OR (1=1|1) --|sum(position) > 0|count(*) > 1|unnest([1, 2]) = 1|nextval('s') = 1
position IN (SELECT position FROM tokens) ORDER BY 1|position IN (SELECT position FROM tokens)) OR (1=1
sum(position) OVER () > 0 LIMIT 1|sum(position) OVER () > 0) OR (1=1
position = ?|position = $1|position = $name|getenv('HOME') = '/root'|COLUMNS(*) > 0|error('boom')
CAST('x' AS INTEGER) = 1|'text'|((|'
"""


def listed(text: str) -> list[str]:
    return [part for line in text.strip().splitlines() for part in line.split("|")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("sandbox")
    write_store(place / "x.acts", [[3, 2], [4]])
    write_store(place / "y.acts", [[3]])
    (place / "secret.csv").write_text("a,b\n1,TOPSECRET\n")
    return place


def select(place, predicate: str):
    names = {
        "secret": place / "secret.csv",
        "tokens": place / "y.acts/segments/00000/tokens.parquet",
        "mine": place / "x.acts/segments/00000/tokens.parquet",
        "store": place / "x.acts",
        "new": place / "new",
    }
    for name, path in names.items():
        predicate = predicate.replace(f"{{{name}}}", str(path))
    return select_rows(place / "x.acts", read_manifest(place / "x.acts"), predicate)


def test_subqueries_statements_and_clauses_are_refused_in_a_line_and_change_nothing(place):
    predicates = [f"({query}) > 0" for query in listed(READ)] + [f"EXISTS ({query})" for query in listed(READ)[:4]]
    predicates += [f"position IN ({query})" for query in listed(READ)[:4]]
    predicates += listed(STATEMENTS) + [f"true; {statement}" for statement in listed(STATEMENTS)] + listed(CLAUSES)
    assert len(predicates) > 120
    before = contents(place)
    for predicate in predicates:
        text = refused(RequestError, lambda predicate=predicate: select(place, predicate))
        assert text.startswith(("query ", "the ")), text
        assert "TOPSECRET" not in text.replace(predicate, "")
    assert contents(place) == before


def test_conditions_over_the_columns_are_answered(place):
    for predicate, rows in {
        "position = 0 -- the first": [0, 3, 5],
        "position BETWEEN 1 AND 1 OR token = 'SELECT'": [1, 4, 6],
        'token LIKE \'%"class":"SUBQUERY"%\'': [],
        "token IN ('%', '日') AND len(token) = 1": [1, 2],
        "list_contains([1, 2], position) AND CASE WHEN is_special THEN false ELSE true END": [1, 2, 4, 6, 7],
    }.items():
        assert select(place, predicate).tolist() == rows, predicate


def test_conditions_may_use_windows_and_subqueries_of_the_tokens(place):
    for predicate, rows in {
        "position IN (SELECT max(position) FROM tokens)": [8],
        "EXISTS (SELECT 1 FROM tokens t WHERE t.sequence = tokens.sequence AND t.row = tokens.row + 2)": [0, 5, 6],
        "sum(position) OVER () > 0": [*range(9)],
        "lead(row) OVER (PARTITION BY sequence ORDER BY position) IS NULL": [2, 4, 8],
        "row_number() OVER (PARTITION BY sequence ORDER BY position DESC) = 1 -- the last": [2, 4, 8],
        "is_last": [2, 4, 8],
        "position_from_end = 1 AND sequence_length > 2": [1, 7],
        "sequence IN (SELECT sequence FROM tokens WHERE sequence_length = 2) AND position = 0": [3],
    }.items():
        assert select(place, predicate).tolist() == rows, predicate


def test_values_of_placeholders_are_data_and_not_sql(place):
    path, manifest = place / "x.acts", read_manifest(place / "x.acts")
    assert select_rows(path, manifest, "position = ? AND row > ?", [1, 2]).tolist() == [4, 6]
    assert select_rows(path, manifest, "position = $p OR row = $p", {"p": 2}).tolist() == [2, 7]
    assert select_rows(path, manifest, "token = ?", ["' OR true --"]).tolist() == []
    remedy = "give parameters, one value for each ? or {name: value} for $name"
    for predicate, values, found in [
        ("position = ?", (), f"no value for placeholder 1; {remedy}"),
        ("position = ?", [1, 2], f"no placeholder for value 2; {remedy}"),
        ("position = 1", [1], f"no placeholder for value 1; {remedy}"),
        ("position = $p", {"q": 1}, f"no value for placeholder p; {remedy}"),
        ("position = $p", {"p": 1, "q": 1}, f"no placeholder for value q; {remedy}"),
        ("position IN (SELECT ? FROM tokens)", (), f"no value for placeholder 1; {remedy}"),
        ("x = ?", [1], 'Referenced column "x" not found'),
        ("position = ? )", [1], ""),
    ]:
        message = refused(RequestError, lambda p=predicate, v=values: select_rows(path, manifest, p, v))
        assert message.startswith(f"query {predicate!r}: {found}"), message
