"""What is known of changes to the planted model, by pairs of prompts or by a direction, and of its vocabulary."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from planted_truths import PlantedStores, Truth, only
from refusals import refused

import workbench as wb
from workbench.analysis.patch_pairs import PatchPair
from workbench.corpus.prompt_pairs import PromptPair
from workbench.embedded import planted
from workbench.embedded.planted import INDUCTION_HEAD, PREVIOUS_HEAD, token_id
from workbench.io.errors import RequestError
from workbench.probes import (
    ActivationPatching,
    AttributionPatching,
    DirectLogitAttribution,
    EdgeAttribution,
    FiberBundle,
    FunctionVectors,
    PathPatching,
    SemanticAxes,
    Steering,
    TokenCharacters,
    UnderTrainedTokens,
    VocabularyKeys,
)


def direct_logit_attribution(stores: PlantedStores) -> None:
    probe = DirectLogitAttribution(parts="heads", predicted="next", where="domain = 'sequences'", resamples=10)
    result = probe.run(stores.corpus, model=stores.model)
    assert result.data["absolute"].to_series().sort_values().index[-1] == "L1H2"
    assert float(result.data["error"]) < 1e-3


def activation_patching(stores: PlantedStores) -> None:
    pairs = wb.prompt_pairs("copying", stores.model, 6)
    data = ActivationPatching(site="z", resamples=10, controls_too=False).run_pairs(stores.model, pairs).data
    for direction in ("denoising", "noising"):
        only(data[direction].to_numpy(), INDUCTION_HEAD, atol=5e-3)


def attribution_patching(stores: PlantedStores) -> None:
    pairs = wb.prompt_pairs("copying", stores.model, 6)
    data = AttributionPatching(site="z", resamples=10, exact_pairs=6).run_pairs(stores.model, pairs).data
    for name in ("estimate", "exact"):
        only(data[name].to_numpy(), INDUCTION_HEAD, atol=0.02)


def path_patching(stores: PlantedStores) -> None:
    """The word is moved by one head. Where the words before two candidates change places, so does the cue that an
    edge from the previous-token head carries to the keys."""
    pairs = wb.prompt_pairs("copying", stores.model, 6)
    data = PathPatching(resamples=10, control_too=False).run_pairs(stores.model, pairs).data
    only(data["denoising"].to_numpy(), INDUCTION_HEAD, atol=5e-3)
    exchanged = [
        PromptPair(
            f"Read: {first} stone {second} river.\nRepeat: {first}",
            f"Read: {second} stone {first} river.\nRepeat: {first}",
            (" stone",),
            (" river",),
        )
        for first, second in (("cloud", "window"), ("garden", "candle"), ("bridge", "paper"))
    ]
    checked = wb.check_pairs(exchanged, stores.model)
    for receiver, heads in (("L1H0.k", [PREVIOUS_HEAD]), ("L1H0.v", [])):
        probe = PathPatching(receivers=(receiver,), resamples=10, control_too=False)
        only(probe.run_pairs(stores.model, checked).data["denoising"].to_numpy(), *heads, atol=5e-3)


def edge_attribution(stores: PlantedStores) -> None:
    pairs = wb.prompt_pairs("copying", stores.model, 6)
    result = EdgeAttribution(resamples=10, sizes=(1, 2)).run_pairs(stores.model, pairs)
    strongest = {(line.sender, line.receiver) for line in result.table.head(2).itertuples()}
    assert strongest == {("embedding", "L1H0.v"), ("L1H0", "logits")}
    np.testing.assert_allclose(result.data["faithfulness"], [0, 1], atol=0.02)
    assert float(result.data["random_faithfulness"].max()) < 0.01


def steering(stores: PlantedStores) -> None:
    direction = np.zeros(planted.D_MODEL)
    direction[planted.OUTPUT[token_id("feather")]] = 1
    probe = Steering(tokens=(" feather",), scales=(0.0, 4.0), prompt=4, new_tokens=2, resamples=10)
    steered = probe.steer(stores.corpus, wb.Direction("resid_post.1", direction, "feather"), model=stores.model)
    share = steered.data["share"]
    assert float(share.sel(kind="direction", scale=4.0)) == 1
    assert float(share.sel(kind="random", scale=4.0)) < 0.2


def function_vectors(stores: PlantedStores) -> None:
    """The mean output of the induction head is the copied word itself, which says nothing of another answer."""
    stone, garden = token_id("stone"), token_id("garden")
    pairs = [
        PatchPair(
            (0, stone, token_id(answer), garden, token_id(donor), stone),
            (0, stone, token_id(donor), garden, token_id(answer), stone),
            (token_id(answer),),
            (token_id(donor),),
            {"question": (5,), "end": (5,)},
        )
        for answer in ("river", "cloud")
        for donor in ("paper", "market", "island")
    ]
    data = FunctionVectors(heads=1, draws=2, resamples=10)._run(stores.model, pairs, [], {"settings": {}}).data
    only(data["effect"].to_numpy(), INDUCTION_HEAD)
    np.testing.assert_allclose(data["accuracy"], [1, 0, 0])
    np.testing.assert_allclose(data["steered_accuracy"], 0)


def under_trained_tokens(stores: PlantedStores) -> None:
    result = UnderTrainedTokens(tested=0).run(stores.model)
    norms = result.data["value"].sel(indicator="embedding_norm")
    np.testing.assert_allclose(norms, np.sqrt(1 + 2 * 16**2), rtol=1e-6)
    assert len(result.table) == 0
    assert "one norm, and no token is known to be unseen" in result.headline()


def semantic_axes(stores: PlantedStores) -> None:
    objects, size = planted.OBJECTS, 3
    pairs = [objects[first : first + 2] for first in range(0, 6 * size, 2)]
    poles = {str(axis): [list(pair) for pair in pairs[size * axis : size * axis + size]] for axis in range(size)}
    path = stores.folder / "poles.json"
    path.write_text(json.dumps(poles))
    data = SemanticAxes(poles=str(path), strength=0.0).run(stores.model).data
    np.testing.assert_allclose(data["alignment_raw"], np.eye(size), atol=1e-6)
    np.testing.assert_allclose(data["alignment"], np.eye(size), atol=0.1)


def refusal(probe: Any, message: str, read: str = "model") -> Truth:
    """Returns the row of a probe for which 64 words are too few."""

    def check(stores: PlantedStores) -> None:
        assert message in refused(RequestError, lambda: probe.run(getattr(stores, read)))

    return Truth("64 words are too few, which is said in one line", check)


TRUTHS = {
    "direct-logit-attribution": Truth("in order, L1H2 writes the next word", direct_logit_attribution),
    "activation-patching": Truth("L1H0 writes the copied word", activation_patching),
    "attribution-patching": Truth("the logits are linear in the output of L1H0 but for the norm", attribution_patching),
    "path-patching": Truth("L1H0 writes the copied word, and finds it by what L0H0 writes", path_patching),
    "edge-attribution": Truth("the copied word goes from the embedding to the values of L1H0", edge_attribution),
    "steering": Truth("a direction of W_U raises its word", steering),
    "function-vectors": Truth("L1H0 holds the answer of its own prompt alone", function_vectors),
    "under-trained-tokens": Truth("all rows have one norm", under_trained_tokens),
    "semantic-axes": Truth("the rows of words are orthogonal", semantic_axes),
    "token-characters": refusal(TokenCharacters(), "token-characters needs 100"),
    "fiber-bundle": refusal(FiberBundle(), "fiber-bundle needs 200"),
    "vocabulary-keys": refusal(VocabularyKeys(), "vocabulary-keys needs 200", "corpus"),
}
