"""What is known of the planted model's states: lenses, labels, geometry, massive activations, neurons, stages."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from planted_truths import HALF, PlantedStores, Truth, stream

from workbench.embedded import planted
from workbench.probes import (
    FeedForwardMaps,
    FutureLens,
    FuturePrompts,
    JacobianLens,
    LinearProbes,
    LogitLens,
    MassiveActivations,
    Neurons,
    NextTokenLaw,
    RepresentationHijacking,
    ResidualUncertainty,
    Similarity,
    Stages,
    TokenErasure,
    TokenGeometry,
    TokenMicroscope,
    TunedLens,
)

GUESS = np.log(planted.VOCAB)
LENGTH = 2 * HALF + 1
AGAIN = f"domain = 'twice' AND position BETWEEN {HALF + 1} AND {2 * HALF - 1}"
"""Words of the second reading that a copied word follows."""
NEW = "domain = 'new' AND position > 0"


def logit_lens(stores: PlantedStores) -> None:
    data = LogitLens(detail=0, where="position > 0").run(stores.corpus).data
    np.testing.assert_allclose(data["mean_entropy"][0], GUESS, atol=1e-4)
    assert float(data["mean_entropy"][1]) < 2.5
    np.testing.assert_allclose(data["mean_kl"][1], 0, atol=1e-6)


def tuned_lens(stores: PlantedStores) -> None:
    data = TunedLens(epochs=60, learning_rate=3e-3, batch=64, detail=0, where="position > 0").run(stores.chains).data
    assert float(data["logit_mean_kl"][0]) > 2
    assert float(data["mean_kl"][0]) < 0.1


def jacobian_lens(stores: PlantedStores) -> None:
    probe = JacobianLens(prompts=4, length=4, skip=0, top_k=1, horizons=1, where="position > 0")
    lens = probe.fit(stores.chains, model=stores.model)
    data = probe.read(lens, stores.chains).data.sel(layer=0, horizon=1)
    assert float(data["recall"]) == 1
    assert float(data["logit_recall"]) < 0.1


def future_lens(stores: PlantedStores) -> None:
    data = FutureLens(horizons=2, epochs=0, where="position > 0", detail=0).run(stores.chains).data
    linear = data.sel({"method": "linear", "layer": 0})
    np.testing.assert_allclose(linear["precision"][:, 0], 1)
    np.testing.assert_allclose(data["bigram_precision"], 1)
    np.testing.assert_allclose(linear["gain"], 0)


def future_prompts(stores: PlantedStores) -> None:
    probe = FuturePrompts(prompts=("Read the",), prompt_tokens=0, learned_for=0, horizons=1, row_limit=40)
    data = probe.run(stores.chains, model=stores.model).data.sel(layer=0, horizon=0)
    np.testing.assert_allclose(data["precision"].isel(k=0), 1)
    np.testing.assert_allclose(data["zero_precision"], 0)


def residual_uncertainty(stores: PlantedStores) -> None:
    data = ResidualUncertainty(where=AGAIN, resamples=10).run(stores.passages).data
    np.testing.assert_allclose(data["cross_entropy"], [GUESS, 0], atol=1e-4)
    np.testing.assert_allclose(data["area"], 0.5, atol=1e-4)
    assert (data["settle_depth"] == 1).all()
    assert (float(data["wrong_share"]), float(data["falling_share"])) == (0, 1)


def next_token_law(stores: PlantedStores) -> None:
    probe = NextTokenLaw(offset=0, norm="none", rows_per_dimension=1, shuffles=2)
    data = probe.run(stores.corpus).data
    for name in ("residual", "residual_shuffled"):
        np.testing.assert_allclose(data[name], 0, atol=1e-9)


def linear_probes(stores: PlantedStores) -> None:
    data = LinearProbes("class", least=20, resamples=10).run(stores.corpus).data
    assert (data["accuracy"] > 0.95).all()  # words that no training document has are unknown to it
    assert (data["shuffled_accuracy"] < 0.8).all()


def similarity(stores: PlantedStores) -> None:
    store = stores.passages
    data = Similarity(site="resid_mid", other=str(store.path), other_site="resid_post", where=NEW).run(store).data
    for name in ("cka", "svcca", "overlap"):
        np.testing.assert_allclose(data[name].sel(layer=1, other_layer=1), 1, atol=1e-5)
    np.testing.assert_allclose(data["cka_shuffled"].sel(layer=1, other_layer=1), 0, atol=0.05)


def token_geometry(stores: PlantedStores) -> None:
    data = TokenGeometry(length=LENGTH, where="domain = 'new'", resamples=10).run(stores.passages).data
    cosines = []
    for ids in new_passages(stores):
        unit = stream(ids)[1:]
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        cosines.append(np.mean([first @ second for first, second in combinations(unit, 2)]))
    np.testing.assert_allclose(data["cosine"], np.mean(cosines), atol=1e-4)
    np.testing.assert_allclose(data["overlap"][0], 1)
    np.testing.assert_allclose(data["duplicates"], 0)


def token_microscope(stores: PlantedStores) -> None:
    data = TokenMicroscope(where=NEW, epochs=0, rows_per_dimension=1, resamples=10).run(stores.passages).data
    np.testing.assert_allclose(data["linearity"][0], 1, atol=1e-6)
    states = np.concatenate([stream(ids)[1:] for ids in new_passages(stores)])
    sizes = np.linalg.svd(states - states.mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(data["anisotropy"], sizes[0] / sizes.sum(), rtol=0.01)


def token_erasure(stores: PlantedStores) -> None:
    probe = TokenErasure(spans="pair", offsets=(-1, 0), early=0, late=1, epochs=60, batch=32, resamples=10)
    data = probe.run(stores.passages).data
    np.testing.assert_allclose(data["accuracy"], 1, atol=0.05)
    np.testing.assert_allclose(data["fall"], 0, atol=0.05)


def feed_forward_maps(stores: PlantedStores) -> None:
    """The size of a row is that of its own state, and 1 for the word before, which the previous-token head writes."""
    probe = FeedForwardMaps(length=12, first=4, row_limit=2, layers=(0,), where="domain = 'new'", resamples=10)
    data = probe.run(stores.passages, model=stores.model).data
    place = np.arange(1, 12)
    before, written = (data["map"].sel(layer=0, stage=stage).to_numpy() for stage in ("attention", "feed-forward"))
    np.testing.assert_allclose(written[place, place], 1, atol=1e-6)
    np.testing.assert_allclose(before[place, place - 1], 1 / (1 + np.sqrt(2 * 16**2 + 1 + 8)), rtol=0.01)
    assert float(data["completeness_error"].max()) < 1e-5


def representation_hijacking(stores: PlantedStores) -> None:
    data = RepresentationHijacking(resamples=10).run(stores.substitutions).data
    overwrite = data["overwrite"].sel(layer=0)
    for condition in ("own", "shuffled"):
        np.testing.assert_allclose(overwrite.sel(condition="substituted"), overwrite.sel(condition=condition), atol=0.1)
    assert (overwrite.sel(condition="substituted") < -0.2).all()
    assert (overwrite.sel(condition="original") > 0.2).all()
    assert data["crossing"].sel(condition="substituted").isnull().all()


def massive_activations(stores: PlantedStores) -> None:
    result = MassiveActivations(resamples=10).run(stores.corpus, model=stores.model)
    data, table = result.data, result.table
    for name, value in (("massive", 1), ("first_tokens", 1), ("dimensions", 2)):
        np.testing.assert_allclose(data[name], value)
    np.testing.assert_allclose(data["top"][:, :2], 1000, rtol=1e-3)
    massive = table.loc[table["massive"] > 0]
    assert set(massive["dimension"]) == set(planted.MASSIVE)
    assert set(massive["token"]) == {"<s>"}
    loss = {change: float(data["loss"].sel(change=change)) for change in ("none", "mean", "zero", "random")}
    assert abs(loss["mean"] - loss["none"]) < 1e-3
    assert abs(loss["random"] - loss["none"]) < 0.05
    assert loss["zero"] > loss["none"] + 0.2


def neurons(stores: PlantedStores) -> None:
    data = Neurons(random=64, top=1).run(stores.corpus, model=stores.model).data
    assert data["prediction"].to_numpy().tolist() == data["suppression"].to_numpy().tolist() == [0, 1 / 64]
    assert float(data["entropy"][1]) == 1 / 64
    corpus_ids = set(stores.corpus.tokens["token_id"].to_pylist())
    silent = [not corpus_ids & set(planted.feature_tokens(name)) for name in planted.FEATURES]
    silent += [planted.token_id(word) not in corpus_ids for word in planted.ORDINALS] + [False, True, True, True]
    np.testing.assert_allclose(data["dead"], [np.mean(silent), 61 / 64])


def stages(stores: PlantedStores) -> None:
    data = Stages(where=AGAIN, control=False, resamples=10).run(stores.passages, model=stores.model).data
    np.testing.assert_allclose(data["agreement_delete"], 0)
    np.testing.assert_allclose(data["kl_delete"][1], GUESS, atol=1e-3)
    np.testing.assert_allclose(data["entropy"], [GUESS, 0], atol=1e-3)
    np.testing.assert_allclose(data["kl_lens"][1], GUESS, atol=1e-3)
    uniform = float(data["recent_uniform"])  # the previous-token head and three heads without a task; one of these
    np.testing.assert_allclose(data["recent"], [(1 + 3 * uniform) / 4, uniform / 4], atol=1e-4)
    for name in ("prediction_neurons", "suppression_neurons"):
        np.testing.assert_allclose(data[name], [0, 1 / 64])


def new_passages(stores: PlantedStores) -> list[list[int]]:
    """Token ids of each passage in which no word stands twice."""
    table = stores.passages.tokens.select(["document", "domain", "token_id"]).to_pandas()
    new = table.loc[table["domain"] == "new"]
    return [part["token_id"].tolist() for _, part in new.groupby("document")]


TRUTHS = {
    "logit-lens": Truth("block 0 writes nothing that W_U reads", logit_lens),
    "tuned-lens": Truth("the next word of a class is linear in the present one", tuned_lens),
    "jacobian-lens": Truth("the successor head maps ordinals to the next word, at any position", jacobian_lens),
    "future-lens": Truth("in order, the present word alone tells all later ones: no gain over a bigram", future_lens),
    "future-prompts": Truth("a moved state takes its ordinal along, from which block 1 counts on", future_prompts),
    "residual-uncertainty": Truth("block 1 alone predicts: a guess before, certain after", residual_uncertainty),
    "next-token-law": Truth("a word's id is linear in the stream, which holds one dimension a word", next_token_law),
    "linear-probes": Truth("a dictionary direction holds the class of a word", linear_probes),
    "similarity": Truth("no neuron of MLP 1 is active at objects, so that it adds nothing", similarity),
    "token-geometry": Truth("all vectors of the stream are known", token_geometry),
    "token-microscope": Truth("where nothing repeats block 1 adds one constant", token_microscope),
    "token-erasure": Truth("no block erases a word or the one before it", token_erasure),
    "feed-forward-maps": Truth("MLP 0 reads the present word alone", feed_forward_maps),
    "representation-hijacking": Truth("no part reads a word by its company", representation_hijacking),
    "massive-activations": Truth("two dimensions of the first token are written with ±1,000", massive_activations),
    "neurons": Truth("the table of neurons", neurons),
    "stages": Truth("block 1 predicts, and needs what block 0 moves", stages),
}
