"""Corpus: from what a user calls texts to planned sequences of token ids; independent of models and stores.

    sources    strings, files, datasets and token ids as a stream of documents
    file_rows  rows of files, by format
    names      names that a column of the token table can have
    values     values of metadata and spans, and the type of a column
    spans      labelled parts of a text, and the tokens that they cover
    tokenizer  tokens added around a text, and the text of a token
    columns    metadata and spans of documents as Arrow tables
    pieces     long texts tokenized in pieces
    layout     documents as sequences on disk, segments, batches
    tokens     token table of planned sequences

A million documents need no more memory than a thousand: documents are read one batch at a time, and planned sequences
lie in flat files. Only one document is in memory as a whole, so a `.txt` file must fit, and a list in a `.json` file.
"""
