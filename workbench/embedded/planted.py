"""The planted model: a two-layer GPT-2 whose weights are set by hand, so that what an analysis must find is known.

Every number follows from the tables of this module: the dimensions of the stream, the heads, the neurons. Each vector
that reads the stream behind a norm sums to 0, so that the norm's centring changes nothing; a pair of large constant
dimensions makes the norm's scale nearly the same for all tokens. docs/planted-model.md describes the construction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

# ---- vocabulary -----------------------------------------------------------------------------------------

BOS, UNKNOWN, SPACE = "<s>", "<unk>", "▁"  # the tokenizer writes a leading space as ▁
CHAINS: Mapping[str, tuple[str, ...]] = {
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": (
        *("January", "February", "March", "April", "May", "June"),
        *("July", "August", "September", "October", "November", "December"),
    ),
    "number": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
}
"""Ordered classes: the successor head raises the next word of a class; the last one has none."""
OBJECTS = (
    *("stone", "river", "cloud", "window", "garden", "candle", "bridge", "paper", "silver", "market", "button"),
    *("forest", "needle", "pocket", "copper", "meadow", "engine", "feather", "island", "kitchen", "pillow", "summer"),
)
NAMES, VERBS, FRAME, MARKS = ("Anna", "Ben", "Clara", "David"), ("saw", "met"), ("Read", "Repeat", "the"), ".:\n"
CLASSES: Mapping[str, tuple[str, ...]] = {
    **CHAINS,
    "object": OBJECTS,
    "name": NAMES,
    "verb": VERBS,
    "frame": FRAME,
    "mark": tuple(MARKS),
}
"""Class to its words, without the leading space."""
ORDINALS = tuple(word for words in CHAINS.values() for word in words)
LETTERS = "abcdefghijklmnopqrstuvwx"
"""First letters that have a feature each, in either case; no word begins with another."""
FEATURES = (*CLASSES, *LETTERS)
"""Names of the 32 directions that 16 dimensions hold; a word has two features, its class and its first letter."""


def _token(word: str) -> str:
    return word if word in MARKS or word == "Repeat" else SPACE + word  # Repeat follows a line break


VOCABULARY = (BOS, UNKNOWN, *(_token(word) for words in CLASSES.values() for word in words))
"""Tokens in the order of their ids, as the tokenizer writes them."""
VOCAB = len(VOCABULARY)


def token_id(word: str) -> int:
    """Returns the id of a word, given without its leading space."""
    return VOCABULARY.index(word if word in (BOS, UNKNOWN) else _token(word))


def feature_tokens(feature: str) -> list[int]:
    """Returns the ids of the tokens that have a feature: a class, or a first letter."""
    words = [word for part in CLASSES.values() for word in part]
    feature_words = CLASSES[feature] if feature in CLASSES else [word for word in words if word[0].lower() == feature]
    return [token_id(word) for word in feature_words]


# ---- dimensions of the stream, heads, neurons -----------------------------------------------------------

D_MODEL, HEADS, D_HEAD, D_MLP, CONTEXT = 256, 4, 64, 64, 128
TOKEN, PREVIOUS, OUTPUT = (range(first, first + VOCAB) for first in (0, 64, 128))
"""One dimension a token: the token itself, the token before it, the prediction (the only ones that W_U reads)."""
POSITION = range(192, 208)
"""Cosine and sine of position x pi / 2^k, k from 0 to 7."""
CONSTANT = (208, 209)
"""+16 and -16 at every token."""
MASSIVE = (210, 211)
"""+1000 and -1000 at the first token, from MLP 0 on: massive activations."""
DICTIONARY = range(212, 228)
"""32 features in 16 dimensions, written by MLP 0."""
ORDINAL = range(228, 256)
"""One dimension for each day, month and number, written by MLP 0 and read by the successor head."""

PREVIOUS_HEAD, INDUCTION_HEAD, SINK_HEAD, SUCCESSOR_HEAD = (0, 0), (1, 0), (1, 1), (1, 2)
"""Layer and head. All other heads attend to all tokens alike and write 0."""
SINKS = (INDUCTION_HEAD, SINK_HEAD)
"""Heads that attend to the first token: one always, one where the present token has not stood before."""
MASSIVE_NEURON, PREDICTION_NEURON, SUPPRESSION_NEURON, ENTROPY_NEURON = (0, 60), (1, 0), (1, 1), (1, 2)
"""Layer and neuron. Neurons 0 to 31 of layer 0 are the features, 32 to 59 the ordinals; all others never fire."""

_CONSTANT, _MASSIVE = 16.0, 1000.0
_SHARP = 30.0  # attention score of a match of tokens; of positions 8 times as much, the next best 60 lower
_LOGIT = 16.0  # of the token that the induction head copies, about


def dictionary() -> Float[Tensor, "feature dimension"]:
    """Returns the 32 unit directions: a Hadamard basis and the standard basis of 16 dimensions.

    Directions of one basis are orthogonal, those of different ones have the cosine 1/4 or -1/4.
    """
    hadamard = torch.ones(1, 1)
    while len(hadamard) < len(DICTIONARY):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return torch.cat([hadamard / 4, torch.eye(len(DICTIONARY))])


def planted_module() -> GPT2LMHeadModel:
    """Returns the model in float32 on the CPU, in eval mode. Costs tens of milliseconds."""
    from transformers import GPT2Config, GPT2LMHeadModel  # seconds

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=D_MODEL,
        n_layer=2,
        n_head=HEADS,
        n_inner=D_MLP,
        activation_function="relu",
        bos_token_id=0,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    config.architectures = ["GPT2LMHeadModel"]
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        body = model.transformer
        blocks: Any = body.h
        body.wte.weight[:, TOKEN] = torch.eye(VOCAB)
        body.wte.weight[:, CONSTANT] = torch.tensor([_CONSTANT, -_CONSTANT])
        body.wpe.weight[:, POSITION] = _clock(torch.arange(CONTEXT))
        _set_attention(blocks[0].attn, blocks[1].attn)
        for block in blocks:
            block.mlp.c_fc.bias.fill_(-1e-3)  # above rounding: a neuron that should not be active is exactly 0
        _set_first_neurons(blocks[0].mlp)
        _set_last_neurons(blocks[1].mlp)
        model.lm_head.weight[:] = _reads(OUTPUT) * (_LOGIT / _SCALE)
    return model


def _clock(position: Tensor) -> Float[Tensor, "position dimension"]:
    angle = position.double()[:, None] * math.pi / 2.0 ** torch.arange(8)
    return torch.stack([angle.cos(), angle.sin()], -1).flatten(1).float()


_NORM = 2 * _CONSTANT**2 + 10  # squared L2 norm of a token: constants, token, position, and the token before it
_SCALE = (D_MODEL / _NORM) ** 0.5
"""Factor of the norms, but at the first token behind MLP 0, where it is 80 times smaller."""
_SCALE_AT_FIRST = (D_MODEL / 2) ** 0.5 / _MASSIVE


def _reads(dimensions: Iterable[int]) -> Float[Tensor, "read d_model"]:
    """Vectors that read one dimension of the stream each, behind a norm; they sum to 0 (see the module)."""
    dimensions = list(dimensions)
    vectors = torch.zeros(len(dimensions), D_MODEL)
    vectors[range(len(dimensions)), dimensions] = 1
    vectors[:, CONSTANT] -= 0.5
    return vectors


def _set_attention(first: GPT2Attention, last: GPT2Attention) -> None:
    """Sets queries, keys, values and outputs of the four heads."""
    clock = _reads(POSITION) / _SCALE
    backwards = _clock(torch.tensor([-1])).view(8, 2)  # cosine and sine of one position back
    turned = clock.view(8, 2, D_MODEL)
    turned = torch.stack(
        [
            backwards[:, :1] * turned[:, 0] - backwards[:, 1:] * turned[:, 1],
            backwards[:, 1:] * turned[:, 0] + backwards[:, :1] * turned[:, 1],
        ],
        1,
    ).flatten(0, 1)
    token, before, ordinal = (_reads(part) / _SCALE for part in (TOKEN, PREVIOUS, ORDINAL))
    massive = _reads(MASSIVE[:1]) / (_SCALE_AT_FIRST * _MASSIVE)  # 1 at the first token
    score = _SHARP * D_HEAD**0.5
    _head(first, PREVIOUS_HEAD[1], score * turned, clock, token, PREVIOUS)
    keys = before.clone()
    keys[token_id(BOS)] = massive / 2  # no token stands before BOS, so its entry is free
    _head(last, INDUCTION_HEAD[1], score * token, keys, token, OUTPUT)
    bias = last.c_attn.bias
    bias[INDUCTION_HEAD[1] * D_HEAD + token_id(BOS)] = score
    _head(last, SINK_HEAD[1], torch.zeros(1, D_MODEL), massive, token, OUTPUT)
    bias[SINK_HEAD[1] * D_HEAD] = score
    _head(last, SUCCESSOR_HEAD[1], score * clock, clock, ordinal, _successors(), size=0.5)


def _head(
    attention: GPT2Attention,
    head: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    target: Sequence[int],
    size: float = 1,
) -> None:
    """Sets one head: what its queries, keys and values read, and the dimensions of the stream it writes values to."""
    start = head * D_HEAD
    for block, reads in enumerate((query, key, value)):
        place = block * D_MODEL + start
        attention.c_attn.weight[:, place : place + len(reads)] = reads.T
    for index, dimension in enumerate(target):
        if dimension >= 0:
            attention.c_proj.weight[start + index, dimension] = size


def _successors() -> list[int]:
    """Dimension of the prediction of each ordinal's successor; -1 for the last of a class."""
    return [
        OUTPUT[token_id(words[index + 1])] if index + 1 < len(words) else -1
        for words in CHAINS.values()
        for index in range(len(words))
    ]


def _set_first_neurons(mlp: Any) -> None:
    """Sets MLP 0: a neuron for each feature, for each ordinal, and for the first token."""
    token = _reads(TOKEN) / _SCALE
    for neuron, (feature, direction) in enumerate(zip(FEATURES, dictionary(), strict=True)):
        mlp.c_fc.weight[:, neuron] = token[feature_tokens(feature)].sum(0)
        mlp.c_proj.weight[neuron, DICTIONARY] = direction
    for index, word in enumerate(ORDINALS):
        mlp.c_fc.weight[:, len(FEATURES) + index] = token[token_id(word)]
        mlp.c_proj.weight[len(FEATURES) + index, ORDINAL[index]] = 1.0
    mlp.c_fc.weight[:, MASSIVE_NEURON[1]] = token[token_id(BOS)]
    mlp.c_proj.weight[MASSIVE_NEURON[1], MASSIVE] = torch.tensor([_MASSIVE, -_MASSIVE])


def _set_last_neurons(mlp: Any) -> None:
    """Sets MLP 1: after a name `saw` is predicted, after a verb a full stop is not; `the` makes the norm larger."""
    token = _reads(TOKEN) / _SCALE
    for neuron, words in ((PREDICTION_NEURON, NAMES), (SUPPRESSION_NEURON, VERBS), (ENTROPY_NEURON, ("the",))):
        mlp.c_fc.weight[:, neuron[1]] = token[[token_id(word) for word in words]].sum(0)
    mlp.c_proj.weight[PREDICTION_NEURON[1], OUTPUT[token_id("saw")]] = 0.5
    mlp.c_proj.weight[SUPPRESSION_NEURON[1], OUTPUT[token_id(".")]] = -0.5
    mlp.c_proj.weight[ENTROPY_NEURON[1], MASSIVE] = torch.tensor([24.0, -24.0])


# ---- tokenizer, autoencoder, corpus ---------------------------------------------------------------------


def planted_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer: one token a word, with its leading space; BOS begins every text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast  # seconds

    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY)}, UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split(Regex(r"[^\w▁]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def planted_autoencoder() -> dict[str, Tensor]:
    """Returns the weights, under SAELens' names, of the JumpReLU autoencoder that reads MLP 0's output as its neurons
    write it.

    Features are numbered as the neurons: 32 directions in superposition, 28 ordinals, the massive one, 3 that nothing
    activates. A feature is active exactly where its neuron is; its value is off by the interference, up to 1/4.
    """
    decoder = torch.zeros(D_MLP, D_MODEL)
    decoder[: len(FEATURES), DICTIONARY] = dictionary()
    decoder[range(len(FEATURES), len(FEATURES) + len(ORDINAL)), ORDINAL] = 1.0
    decoder[MASSIVE_NEURON[1], MASSIVE] = torch.tensor([0.5**0.5, -(0.5**0.5)])
    return {
        "W_enc": decoder.T.clone(),
        "W_dec": decoder,
        "b_enc": torch.zeros(D_MLP),
        "b_dec": torch.zeros(D_MODEL),
        "threshold": torch.full((D_MLP,), 0.6),
    }


def planted_corpus() -> list[dict[str, Any]]:
    """Returns the planted model's texts, as `record` accepts them: 72 documents of 3 domains, the same at every call.

    "copying": words and the same words again; "sequences": consecutive days, months, numbers; "sentences": no word
    stands twice, so that both sinks are seen. `domain` is a column of the token table, and so is the label `class`:
    day, month, number, object, name, verb, frame.
    """
    draw = Random(0)
    documents = []
    for index in range(24):
        documents += [_copying(draw), _sequences(draw, list(CHAINS)[index % 3]), _sentences(draw)]
    return documents


def _copying(draw: Random) -> dict[str, Any]:
    words = draw.sample(OBJECTS, draw.randint(6, 12))
    passage = [f" {word}" for word in words]
    return _document("copying", [" Read", ":", *passage, ".", "\n", "Repeat", ":", *passage, "."])


def _sequences(draw: Random, name: str) -> dict[str, Any]:
    words = CHAINS[name]
    start = draw.randint(0, 3)
    return _document("sequences", [f" {word}" for word in words[start : start + draw.randint(3, 9)]] + ["."])


def _sentences(draw: Random) -> dict[str, Any]:
    names, (first_verb, second_verb) = draw.sample(NAMES, 2), draw.sample(VERBS, 2)
    noun, day = draw.choice(OBJECTS), draw.choice(CHAINS["day"])
    return _document(
        "sentences", [f" {word}" for word in (names[0], first_verb, "the", noun, day, names[1], second_verb)]
    )


def _document(domain: str, pieces: Sequence[str]) -> dict[str, Any]:
    """A document of words with their leading space; the first one's is left out of the text."""
    class_of = {word: name for name, words in CLASSES.items() for word in words if name != "mark"}
    text, spans = "", []
    for piece in pieces:
        word = piece.lstrip(" ")
        text += piece if text else word
        if word in class_of:
            spans.append({"start": len(text) - len(word), "end": len(text), "value": class_of[word]})
    return {"text": text, "domain": domain, "spans": {"class": spans}}
