"""From what a user calls texts to planned sequences of token ids; knows nothing of models and stores.

    sources  read_documents, check_source     strings, files, datasets, token ids -> a stream of documents
    spans    Span, read_spans, label_tokens   labelled parts of a text -> columns of the token table
    tokens   added_tokens, token_texts        what the tokenizer puts around a text; what a token stands for
    plan     plan_sequences and the rest      documents -> sequences on disk, segments, batches, token table

A million documents need no more memory than a thousand: documents are read one batch at a time and what is
planned lies in flat files. The only thing held whole is one document, so a `.txt` file must fit in memory.
"""

from workbench.corpus.plan import (
    Sequences,
    batch_plan,
    digest,
    open_sequences,
    plan_sequences,
    segment_plan,
    token_table,
)
from workbench.corpus.sources import Document, check_source, read_documents
from workbench.corpus.spans import Span
from workbench.corpus.tokenizer import TOKEN_SCHEMA, AddedTokens, added_tokens, token_texts

__all__ = [
    "TOKEN_SCHEMA",
    "AddedTokens",
    "Document",
    "Sequences",
    "Span",
    "added_tokens",
    "batch_plan",
    "check_source",
    "digest",
    "open_sequences",
    "plan_sequences",
    "read_documents",
    "segment_plan",
    "token_table",
    "token_texts",
]
