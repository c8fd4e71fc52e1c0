"""Two real tokenizers."""

import pytest
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def stories(stories260k):
    """BPE of SentencePiece's kind with byte pieces; adds BOS."""
    return AutoTokenizer.from_pretrained(stories260k)


@pytest.fixture(scope="module")
def letters(babyllama):
    """Single characters; adds BOS; newline is <unk>."""
    return AutoTokenizer.from_pretrained(babyllama)
