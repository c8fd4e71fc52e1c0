"""Tokenizers of every kind, and short ways to plan sequences and make token tables."""

from __future__ import annotations

import tempfile

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from workbench.corpus.layout import Layout, plan_sequences
from workbench.corpus.sources import read_documents
from workbench.corpus.tokenizer import AddedTokens, added_tokens, token_texts
from workbench.corpus.tokens import token_table

NOTHING = AddedTokens()


def byte_level():
    """As GPT-2's: adds nothing, and its one special token is BOS, EOS and <unk> at once."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]
    pieces = [*alphabet, *map("".join, merges), "<|endoftext|>"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end)


def appends_eos():
    """Byte-level, "</s>" after each text, and a BOS token that it does not use by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*alphabet, "<s>", "</s>"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 257)])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def unigram():
    """As SentencePiece's: leading spaces are part of the pieces; "<s> text </s>", so it has both added tokens."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("ing", -2.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def letters_as_bytes(*letters):
    """SentencePiece's byte fallback with a vocabulary that holds no letter but these: "a" is the byte 0x61."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", *letters]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def word_pieces():
    """As BERT's: lower case, pieces inside a word begin with ##."""
    pieces = ["[UNK]", "[CLS]", "a", "cat", "##s", "the", "."]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="[CLS]", unk_token="[UNK]")


def two_words():
    """Whole words only and no <unk>: it cannot encode most letters."""
    backend = Tokenizer(models.WordLevel({"hello": 0, "world": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class Letters(PreTrainedTokenizer):
    """A tokenizer written in Python, as older models bring: no offsets. "<" before and ">" after each text."""

    def __init__(self, **kwargs):
        self.pieces = ["<", ">", "?", *"abcdefgh "]
        super().__init__(bos_token="<", eos_token=">", unk_token="?", **kwargs)

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)}

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.pieces.index(token) if token in self.pieces else 2

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [0, *token_ids_0, 1]


BYTE_LEVEL, APPENDS_EOS, UNIGRAM = byte_level(), appends_eos(), unigram()


def plan(texts, tokenizer=BYTE_LEVEL, *, workdir=None, bos="model", context=16, packed=False, max_rows=None, **options):
    reading = {name: options.pop(name) for name in ("text_column", "metadata") if name in options}
    with tempfile.TemporaryDirectory() if workdir is None else tempfile.TemporaryDirectory(dir=workdir) as folder:
        layout = Layout(context, added_tokens(tokenizer, bos), packed, max_rows, options.pop("vocab", None))
        return plan_sequences(read_documents(texts, **reading), tokenizer, layout, folder, **options)


def lists(sequences):
    """The token ids of each sequence."""
    return [part.tolist() for part in np.split(sequences.token_ids, sequences.starts[1:-1])]


def table(sequences, tokenizer=BYTE_LEVEL, first=0, last=None, row_offset=0, sequence_offset=0, document_offset=0):
    return token_table(
        sequences,
        first,
        len(sequences.lengths) if last is None else last,
        row_offset=row_offset,
        sequence_offset=sequence_offset,
        document_offset=document_offset,
        text_of=lambda ids: token_texts(tokenizer, ids),
    )


def texts_of(texts, **options):
    return [document.text for document in read_documents(texts, **options)]
