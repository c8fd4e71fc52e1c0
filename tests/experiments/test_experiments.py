"""The experiments on the embedded model and few documents: their numbers, figures, and the same bytes again."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import EntryPoint

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from refusals import refused

import workbench as wb
from workbench.experiments import (
    emergence,
    erasure_curves,
    future_curves,
    inputs,
    lens_curves,
    panels,
    sae_layers,
    sae_losses,
    sinks,
    successor_scores,
)
from workbench.experiments.controls import random_copy
from workbench.io.errors import RequestError
from workbench.recording import record as recorder
from workbench.results import registry
from workbench.runs.folders import Run, execute
from workbench.runs.sweep import combine, grid, sweep

MODULES = {
    module.NAME: module
    for module in (
        emergence,
        erasure_curves,
        future_curves,
        lens_curves,
        sae_layers,
        sae_losses,
        sinks,
        successor_scores,
    )
}
SMALL = {
    "emergence": {"rows": 640, "length": 32},
    "erasure-curves": {"epochs": 1, "rows": 900, "documents": 12, "offsets": (-1, 0)},
    "future-curves": {"horizons": 2, "rows": 900, "documents": 12},
    "lens-curves": {"rows": 600, "documents": 12},
    "sae-layers": {"rows": 600, "documents": 12},
    "sae-losses": {"rows": 1500, "documents": 12, "d_sae": 64, "k": 4, "steps": 12, "batch": 128, "aux_loss": "zipf"},
    "sinks": {"rows": 640, "length": 32},
    "successor-scores": {"permutations": 60, "rows": 64, "documents": 2},
}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    entries = [EntryPoint(name, module.__name__, "workbench.experiments") for name, module in MODULES.items()]
    installed = registry.entry_points
    of_group = lambda group: entries if group == "workbench.experiments" else installed(group=group)  # noqa: E731
    monkeypatch.setattr(registry, "entry_points", of_group)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """One folder of recordings for all tests here: what they share is recorded once."""
    return tmp_path_factory.mktemp("recordings")


def small(name, recordings, **settings):
    return MODULES[name].Config(recordings=recordings, **{**SMALL[name], **settings})


@pytest.mark.parametrize("name", MODULES)
def test_every_experiment_runs_twice_to_the_same_bytes(name, recordings, tmp_path):
    config = small(name, recordings)
    results = [execute(Run(name, config, tmp_path / run)) for run in ("one", "two")]
    tables = [(tmp_path / run / "results" / "table.parquet").read_bytes() for run in ("one", "two")]
    assert tables[0] == tables[1]
    table = results[0].table
    assert len(table)
    assert (table["seed"] == 0).all()
    assert results[0].headline().count("\n") == 0
    figures = results[0].figures()
    assert sorted(path.stem for path in (tmp_path / "one" / "results" / "figures").glob("*.html")) == sorted(figures)
    assert all(sum(len(np.atleast_1d(trace.y)) for trace in figure.data) for figure in figures.values())
    combination = combine(name, results)
    assert len(combination.table) == 2 * len(table)
    assert list(combination.table.columns) == list(table.columns)
    assert list(combination.figures()) == list(figures)


def test_every_registered_experiment_is_one_of_these():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    registered = project["entry-points"]["workbench.experiments"]
    assert registered == {name: module.__name__ for name, module in MODULES.items()}


# ---- what each must show --------------------------------------------------------------------------------


def test_a_random_model_has_the_sinks_of_uniform_attention_and_the_trained_one_more(recordings):
    trained, random = (
        sinks.run(small("sinks", recordings, weights=weights)).table.iloc[0] for weights in ("trained", "random")
    )
    uniform = sum(1 / q for q in range(1, 33)) / 32  # what evenly spread attention pays to the first of 32 keys
    assert random["strongest_alpha"] == pytest.approx(uniform, abs=0.03)
    assert random["sink"] == 0
    assert trained["sink_low"] <= trained["sink"] <= trained["sink_high"]
    assert trained["sink"] > 3
    assert trained["sequences"] == random["sequences"] >= 16


def test_epsilon_and_input_matter_to_sinks(recordings):
    shares = [sinks.run(small("sinks", recordings, epsilon=epsilon)).table["sink"][0] for epsilon in (0.0, 0.3, 1.0)]
    assert shares[0] == 100 > shares[1] > shares[2] == 0
    for kind in ("random", "repeated"):
        store = sinks._store(small("sinks", recordings, input=kind))
        ids = store.tokens["token_id"].to_numpy().reshape(20, 32)
        assert len({tuple(line) for line in ids}) == 20
        assert [len(set(line)) == 1 for line in ids.tolist()] == [kind == "repeated"] * 20


def test_random_and_repeated_sequences_hold_no_special_tokens_and_begin_as_asked():
    model = wb.load_model("demo", device="cpu")
    special = set(model.tokenizer.all_special_ids)
    for kind in ("random", "repeated"):
        plain = inputs.token_sequences(model, kind, 300, 16, bos=False, seed=0)
        begun = inputs.token_sequences(model, kind, 300, 16, bos=True, seed=0)
        assert {len(line) for line in plain + begun} == {16}
        assert not special & {token for line in plain for token in line}
        prefix = model.tokenizer("x")["input_ids"][:1]
        assert {line[0] for line in begun} == set(prefix)
        assert inputs.token_sequences(model, kind, 300, 16, bos=False, seed=0) == plain
        assert inputs.token_sequences(model, kind, 300, 16, bos=False, seed=1) != plain
    drawn = {token for line in inputs.token_sequences(model, "random", 300, 16, bos=False, seed=0) for token in line}
    assert max(drawn) > 0.9 * len(model.tokenizer)


def test_sinks_emerge_between_checkpoints(recordings, tmp_path):
    model = wb.load_model("demo", device="cpu")
    for step, module in ((0, random_copy(model).module), (400, model.module)):
        module.save_pretrained(tmp_path / f"checkpoint-{step}")
        model.tokenizer.save_pretrained(tmp_path / f"checkpoint-{step}")
    checkpoints = tuple(str(tmp_path / f"checkpoint-{step}") for step in (0, 400))
    result = emergence.run(small("emergence", recordings, checkpoints=(str(tmp_path),)))
    assert result.table["step"].unique().tolist() == [0, 400]
    sink, loss = (part["value"].tolist() for _, part in result.table.groupby("measure"))
    assert sink[0] == 0 < sink[1]
    assert loss[0] == pytest.approx(math.log(model.vocab), abs=0.3)  # it knows nothing
    assert 1 < loss[1] < loss[0] - 1
    assert result.headline().startswith("Over 2 checkpoints (steps 0 to 400): attention-sinks.sink from 0 to")
    measures = ("induction-heads.excess:max", "induction-heads.queries")
    config = small("emergence", recordings, checkpoints=checkpoints, text="repeats", sites=("pattern",), length=48)
    table = emergence.run(replace(config, measures=measures, settings=("induction-heads.resamples=9",))).table
    excess = table.loc[table["measure"] == measures[0]]
    assert excess["value"].iloc[0] < 0.05 < 0.5 < excess["value"].iloc[1]
    assert (excess["low"] <= excess["value"]).all()


def test_a_measure_is_read_at_one_place_with_its_interval():
    data = xr.Dataset({"a": ("layer", [1.0, 3.0, np.nan]), "a_low": ("layer", [0.0, 2.0, np.nan]), "b": ((), 5.0)})
    data["word"] = ("layer", ["one", "two", "three"])
    read = lambda variable, over: emergence.read_measure(data, f"p.{variable}", variable, over)[:2]  # noqa: E731
    assert read("a", "max") == (3, 2)
    assert read("a", "min") == read("a", "first") == (1, 0)
    assert read("a", "mean")[0] == 2
    assert math.isnan(read("a", "last")[0])
    assert read("b", "")[0] == 5
    assert "has the axes layer" in refused(RequestError, lambda: read("a", ""))
    assert "was not computed" in refused(RequestError, lambda: read("c", "max"))
    assert "p.word is text" in refused(RequestError, lambda: read("word", "max"))


def test_steps_are_read_off_names(tmp_path):
    steps = emergence.training_steps
    assert steps(("run-2/checkpoint-500", "run-2/checkpoint-1000")) == [500, 1000]
    assert steps(("org/pythia-14m@step1", "org/pythia-14m@step512")) == [1, 512]
    assert steps(("org/pythia-14m@step512", "org/pythia-14m@main")) == [0, 1]  # 14 is no step
    assert steps(("a/final", "a/step3")) == [0, 1]
    for name in ("step-100", "step-20", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    checkpoints = emergence.all_checkpoints(("demo", str(tmp_path)))
    assert checkpoints == ("demo", str(tmp_path / "step-20"), str(tmp_path / "step-100"))
    assert steps(("a/x1", "b/x1")) == [0, 1]


def test_the_last_layers_lens_is_the_model(recordings):
    table = lens_curves.run(small("lens-curves", recordings)).table
    last = table[table["layer"] == table["layer"].max()].iloc[0]
    assert (last["kl"], last["agreement"]) == (0, 1)
    assert last["surprise"] < last["cross_entropy"]  # the model's own choice is its most probable token
    assert table["cross_entropy"].iloc[0] > last["cross_entropy"]


def test_a_tuned_lens_is_nearer_to_the_model(recordings):
    untrained, tuned = (
        lens_curves.run(small("lens-curves", recordings, lens="tuned", epochs=epochs)).table for epochs in (0, 3)
    )
    assert tuned["kl"][0] < untrained["kl"][0]
    logit = lens_curves.run(small("lens-curves", recordings)).table
    assert tuned["tokens"][0] < logit["tokens"][0]  # held-out documents only


def test_successor_heads_stand_out_in_the_trained_model_alone(recordings):
    trained, random = (
        successor_scores.run(small("successor-scores", recordings, weights=weights)).table
        for weights in ("trained", "random")
    )
    assert trained["p_family"].min() < 0.05 < random["p_family"].min()
    assert trained["macro"].max() > 0.6
    model = wb.load_model("demo", device="cpu")
    assert len(trained) == model.site_map.n_layers * model.module.config.num_attention_heads


def test_the_bigram_is_a_floor_that_states_pass_at_the_next_token(recordings):
    table = future_curves.run(small("future-curves", recordings, rows=2500, documents=40)).table
    assert set(table["method"]) == {"linear"}
    last = table[(table["layer"] == table["layer"].max()) & (table["horizon"] == 0)].iloc[0]
    assert last["precision"] > 0.8  # the last block's state is what the next token is read from
    np.testing.assert_allclose(table["gain"], table["seen_precision"] - table["bigram_seen_precision"], atol=1e-9)
    assert {"linear", "direct"} == set(future_curves.run(small("future-curves", recordings, epochs=1)).table["method"])


def test_own_tokens_are_read_better_than_those_before(recordings):
    table = erasure_curves.run(small("erasure-curves", recordings, rows=2500, documents=40)).table
    first = table[(table["layer"] == 0) & (table["group"] == "control")].set_index("offset")["accuracy"]
    assert first[0] > first[-1] > 0


def test_sae_metrics_are_those_of_the_site_it_was_trained_on(recordings, tmp_path):
    line = sae_layers.run(small("sae-layers", recordings)).table.iloc[0]
    sae = wb.load_sae("demo")
    assert f"blocks.{line['layer']}." in sae.site
    assert 0.5 < line["explained_variance"] < 1
    assert line["loss_clean"] < line["loss_spliced"]
    assert 0.5 < line["loss_recovered"] < 1
    elsewhere = sae_layers.run(small("sae-layers", recordings, weights="random", spliced=False)).table.iloc[0]
    assert elsewhere["explained_variance"] < line["explained_variance"]
    assert np.isnan(elsewhere["loss_recovered"])


# ---- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sinks", {"rows": 0}, "rows must be at least 1, not 0"),
        ("sinks", {"rows": 31}, "rows is 31, less than one sequence of length 32; give more rows"),
        ("sinks", {"epsilon": 2.0}, "epsilon must be from 0 to 1, not 2.0"),
        ("sinks", {"seed": -1}, "seed must be at least 0, not -1"),
        ("emergence", {"checkpoints": ()}, "checkpoints is empty; name one or more folders"),
        ("emergence", {"documents": 0}, "documents must be at least 1, not 0"),
        ("emergence", {"measures": ("sink",)}, "measures: 'sink' is no measure; write PROBE.VARIABLE"),
        ("emergence", {"measures": ("logit-lens.los:max",)}, "measures: logit-lens has no variable 'los'"),
        ("emergence", {"settings": ("logit-lens.detial=0",)}, "settings: logit-lens has no setting 'detial'"),
        ("erasure-curves", {"epochs": 0}, "epochs must be from 1 to 100000, not 0"),
        ("future-curves", {"horizons": 0}, "horizons must be from 1 to 1000, not 0"),
        ("lens-curves", {"epochs": -1}, "epochs must be at least 0, not -1"),
        ("successor-scores", {"permutations": 0}, "permutations must be at least 1, not 0"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_runs(name, settings, message, recordings):
    assert refused(RequestError, lambda: small(name, recordings, **settings)).startswith(message)


def test_documents_are_the_first_ones_in_the_seeds_order(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(f'{{"text": "story {i}", "tag": "{i % 2}"}}\n' for i in range(30)))
    first, again, of_another_seed = (inputs.documents_of(str(file), 20, seed) for seed in (0, 0, 1))
    assert first == again != of_another_seed
    for documents in (first, of_another_seed):
        assert sorted(document["text"] for document in documents) == sorted(f"story {i}" for i in range(20))
    assert set(first[0]) == {"text", "tag"}
    demo = sorted(wb.demo_corpus()[:5], key=str)
    assert sorted(inputs.documents_of("demo", 5, 0), key=str) == demo  # spans and all


def test_a_revision_is_what_follows_the_last_at_sign(monkeypatch, tmp_path):
    demo, requests = wb.load_model("demo"), []

    def load(source, **options):
        requests.append((source, options["revision"]))
        return demo

    monkeypatch.setattr(inputs.wb, "load_model", load)
    inputs.model_of.cache_clear()
    folder = tmp_path / "a@b"
    folder.mkdir()
    for name in ("org/m@step5", "org/m", str(folder)):
        inputs.model_of(name)
    assert requests == [("org/m", "step5"), ("org/m", None), (str(folder), None)]
    inputs.model_of.cache_clear()


# ---- a sweep of them ------------------------------------------------------------------------------------


def test_a_sweep_over_models_shares_recordings_and_survives_a_missing_one(tmp_path, monkeypatch):
    real, recordings_made = recorder.record_plan, []

    def counting(plan, model, texts, out, *arguments):
        recordings_made.append(out)
        return real(plan, model, texts, out, *arguments)

    monkeypatch.setattr(recorder, "record_plan", counting)
    choices = {"model": ("demo", str(tmp_path / "none")), "input": ("natural", "random", "repeated")}
    choices |= {"epsilon": (0.2, 0.3), "rows": (640,), "length": (32,), "recordings": (tmp_path / "recordings",)}
    configs = grid(sinks.Config, choices)
    lines = []
    swept = sweep("sinks", configs, tmp_path / "out", report=lines.append)
    assert [outcome.state for outcome in swept.outcomes] == ["done"] * 6 + ["failed"] * 6
    assert len(recordings_made) == 3  # epsilon shares them
    assert swept.failed[0].message.startswith(f"model {str(tmp_path / 'none')!r}: no such directory")
    table = pd.read_parquet(tmp_path / "out" / "summary" / "table.parquet")
    assert table[["input", "epsilon"]].to_numpy().tolist() == [
        [kind, epsilon] for kind in ("natural", "random", "repeated") for epsilon in (0.2, 0.3)
    ]
    for _, pair in table.groupby("input"):
        assert pair["sink"].iloc[0] >= pair["sink"].iloc[1]
    figure = swept.result.figure("sinks")
    assert [trace.name for trace in figure.data] == ["natural", "random", "repeated"] * 2  # a panel for each epsilon
    again = sweep("sinks", configs, tmp_path / "out", report=lines.append)
    assert [outcome.state for outcome in again.outcomes] == ["skipped"] * 6 + ["failed"] * 6
    assert len(recordings_made) == 3


def test_figures_name_models_apart_and_average_seeds_alone():
    settings = [
        {"model": model, "epsilon": epsilon, "seed": seed}
        for model in ("/x/step1/model", "/x/step2/model")
        for epsilon in (0.1, 0.2)
        for seed in (0, 1)
    ]
    lines = [{**setting, "layer": layer, "y": setting["seed"] + 10 * layer} for setting in settings for layer in (0, 1)]
    result = wb.Result("made-up", None, pd.DataFrame(lines), {"settings": {"runs": settings}})
    figure = panels.curves(result, x="layer", y="y", title="t", x_title="layer", unit="u")
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == [f"step{step}/model, epsilon {epsilon}" for step in (1, 2) for epsilon in (0.1, 0.2)]
    assert [list(trace.y) for trace in figure.data] == [[0.5, 10.5]] * 4
    assert "mean over seeds" in figure.layout.title.subtitle.text
    spread = (
        panels.curves(
            wb.Result(
                "made-up",
                None,
                pd.DataFrame(lines).assign(low=lambda t: t["y"] - 1, high=lambda t: t["y"] + 2),
                {"settings": {"runs": settings}},
            ),
            x="layer",
            y="y",
            interval=("low", "high"),
            title="t",
            x_title="layer",
            unit="u",
        )
        .data[0]
        .error_y
    )
    assert (list(spread.array), list(spread.arrayminus)) == ([2.5, 2.5], [1.5, 1.5])


def test_text_of_tables_is_no_markup():
    settings = {"model": "<b>$x$</b>", "seed": 0}
    result = wb.Result("made-up", None, pd.DataFrame([{**settings, "layer": 0, "y": 1.0}]), {"settings": settings})
    figure = panels.curves(result, x="layer", y="y", title="t", x_title="layer", unit="u")
    (title,) = figure.layout.annotations
    assert "<b>" not in title.text
    assert "$" not in title.text
