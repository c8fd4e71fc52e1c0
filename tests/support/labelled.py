"""Labelled texts: an example, sources of every kind, and the expected columns character by character."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq

TEXT = "Once upon a time Monday was the little day"
SPANS = {
    "entity": [{"start": 17, "end": 23, "value": "day"}, {"start": 0, "end": 4, "value": "once"}],
    "rank": [{"start": 24, "end": 27, "value": 3}],
}


def by_character(rows, records):
    """Value, number and cut of every label for every row, found by painting characters one by one.

    A span is cut if rows of several sequences touch it.
    """
    labels = dict.fromkeys(label for record in records for label in record["spans"] or {})
    columns = {column: [] for label in labels for column in (label, f"{label}_span", f"{label}_cut")}
    sequences = {}
    for row in rows:
        spans = records[row["document"]]["spans"] or {}
        for label in labels:
            painted = {}
            for number, span in enumerate(sorted(spans.get(label) or [], key=lambda span: span["start"])):
                for character in range(span["start"], span["end"]):
                    painted[character] = (span["value"], number)
            touched = [painted[i] for i in range(row["char_start"], row["char_end"]) if i in painted]
            value, number = touched[0] if touched else (None, None)
            columns[label].append(value)
            columns[f"{label}_span"].append(number)
            for _, number_of in touched:
                sequences.setdefault((row["document"], label, number_of), set()).add(row["sequence"])
    for index, row in enumerate(rows):
        for label in labels:
            number = columns[f"{label}_span"][index]
            columns[f"{label}_cut"].append(
                None if number is None else len(sequences[row["document"], label, number]) > 1
            )
    return columns


def source(kind, records, folder):
    """`records` as the kind of source that the name says."""
    if kind == "list":
        return records
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
        return folder / "a.jsonl"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet", row_group_size=2)
        return folder / "a.parquet"
    if kind == "pandas":
        pq.write_table(pa.Table.from_pylist(records), folder / "a.parquet")
        return pq.read_table(folder / "a.parquet").to_pandas().to_dict("records")
    import datasets

    dataset = datasets.Dataset.from_list(records)
    return dataset.with_format("numpy") if kind == "numpy dataset" else dataset
