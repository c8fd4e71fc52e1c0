"""The contract of a probe as a test class: inherit it, name the probe and give it a store."""

from __future__ import annotations

import inspect
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import MISSING, FrozenInstanceError, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import xarray as xr

from workbench.model.load import Model
from workbench.results import registry
from workbench.results.probe import definition, setting_meanings
from workbench.results.registry import find_probe, runs_on_models
from workbench.results.result import Result, load_result, with_device
from workbench.results.variable import Variable
from workbench.store.reader import Store

_CACHE = pytest.StashKey[Result]()


class ProbeContract:
    """Tests that every probe passes. Runs the probe twice on the store, so choose both small.

        class TestNormGrowth(ProbeContract):
            probe = NormGrowth
            settings = {"where": "row > 0"}

            @pytest.fixture
            def store(self, tmp_path):
                return wb.record("demo", ["a text"], out=tmp_path / "x.acts")

    The probe must be installed under its name, since figures of a saved result look it up.
    """

    probe: ClassVar[type[Any]]
    """The class under test."""
    settings: ClassVar[Mapping[str, Any]] = {}
    """Settings that make its run short."""

    @pytest.fixture
    def store(self) -> Store | Model:
        """Returns the store that the probe reads, or the model for a probe of weights; the subclass gives it."""
        raise NotImplementedError(f"{type(self).__name__} needs a fixture `store` that returns a recorded store")

    @pytest.fixture
    def model(self) -> Model | None:
        """Returns the recorded model, for a probe that needs it and whose store's name does not suffice to load it."""
        return None

    @pytest.fixture
    def result(self, request: pytest.FixtureRequest, store: Store | Model, model: Model | None) -> Result:
        """Returns one result for all tests of the class, of the first store that is given."""
        stash = request.node.parent.stash
        if _CACHE not in stash:
            stash[_CACHE] = self.probe(**self.settings).run(store, model=model)
        return stash[_CACHE]

    # Settings

    def test_settings_are_a_frozen_dataclass_with_defaults(self) -> None:
        """Settings are a frozen dataclass; every field has a default."""
        assert is_dataclass(self.probe)
        for field in fields(self.probe):
            assert field.default is not MISSING or field.default_factory is not MISSING, f"{field.name} has no default"
        first = next(iter(fields(self.probe)), None)
        if first is not None:
            with pytest.raises(FrozenInstanceError):
                setattr(self.probe(), first.name, None)

    def test_settings_compare_and_pickle(self) -> None:
        """Equal settings compare equal, and survive pickling."""
        probe = self.probe(**self.settings)
        assert pickle.loads(pickle.dumps(probe)) == probe == self.probe(**self.settings)
        assert hash(probe) == hash(self.probe(**self.settings))

    def test_settings_are_json(self) -> None:
        """Settings can be written as JSON and read again."""
        json.dumps(asdict(self.probe(**self.settings)))

    def test_every_setting_is_documented(self) -> None:
        """Every field has a docstring."""
        meanings = setting_meanings(self.probe)
        assert [field.name for field in fields(self.probe) if not meanings.get(field.name)] == []

    # What the class declares

    def test_it_is_installed_under_its_name(self) -> None:
        """The entry point of the probe's name gives its class."""
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.probe.name)
        assert find_probe(self.probe.name) is self.probe
        on_models = runs_on_models(registry.installed_probes()[self.probe.name])
        assert on_models is not getattr(self.probe, "needs_store", True), "state needs_store in the class itself"

    def test_its_docstrings_are_a_definition_and_a_line(self) -> None:
        """The module's docstring defines the measure; the class's first line is its summary."""
        assert definition(self.probe), "the module's docstring is the definition in a report"
        line, _, rest = (self.probe.__doc__ or "").strip().partition("\n")
        assert line.endswith((".", "?")), "the class's first line is a sentence"
        assert not rest or not rest.partition("\n")[0].strip(), "an empty line follows the first"

    def test_run_takes_a_store_and_the_model_by_name(self) -> None:
        """`run` takes the store by position and the model by keyword."""
        assert isinstance(self.probe.needs_model, bool)
        _, store, model = inspect.signature(self.probe.run).parameters.values()
        assert store.name == "store"
        assert (model.name, model.kind, model.default) == ("model", inspect.Parameter.KEYWORD_ONLY, None)

    def test_sources_and_controls_are_texts(self) -> None:
        """Sources and controls map texts to texts."""
        assert all(isinstance(source, str) for source in getattr(self.probe, "sources", ()))
        for name, meaning in getattr(self.probe, "controls", {}).items():
            assert isinstance(name, str)
            assert isinstance(meaning, str)

    def test_variables_are_declared_once(self) -> None:
        """Variables have different names, and each has a meaning."""
        variables = self.probe.variables
        assert variables
        assert all(isinstance(variable, Variable) for variable in variables)
        names = [variable.name for variable in variables]
        assert len(set(names)) == len(names)
        assert [variable.name for variable in variables if not (variable.units and variable.meaning)] == []

    # What a run gives

    def test_a_run_gives_the_declared_variables(self, result: Result) -> None:
        """A run returns the declared variables with the declared axes."""
        assert isinstance(result, Result)
        assert isinstance(result.table, pd.DataFrame)
        declared = {variable.name: variable for variable in self.probe.variables}
        assert result.data.data_vars
        for name, values in result.data.data_vars.items():
            variable = declared[str(name)]
            assert values.dims == variable.dims, name
            assert values.attrs.items() >= variable.attrs.items(), name

    def test_a_result_names_its_probe_and_its_source(self, result: Result, store: Store | Model) -> None:
        """The result states its probe and its store."""
        assert result.probe == self.probe.name
        known = result.provenance
        model, source = (
            (store.fingerprint(), store.fingerprint())
            if isinstance(store, Model)
            else (store.manifest.model.fingerprint, store.manifest.fingerprint)
        )
        assert known["model_fingerprint"] == model
        assert known["store_fingerprint"] == source
        settings = with_device(asdict(self.probe(**self.settings)))
        assert json.loads(json.dumps(with_device(known["settings"]))) == json.loads(json.dumps(settings))

    def test_the_same_run_gives_the_same_result(
        self, result: Result, store: Store | Model, model: Model | None
    ) -> None:
        """Two runs with the same settings return the same result."""
        second = self.probe(**self.settings).run(store, model=model)
        xr.testing.assert_identical(second.data, result.data)
        pd.testing.assert_frame_equal(second.table, result.table)

    def test_figures_are_made_of_a_saved_result_alone(self, result: Result, tmp_path: Path) -> None:
        """A saved and loaded result gives the same figures, without its store."""
        loaded = load_result(result.save(tmp_path / "result"))
        xr.testing.assert_identical(loaded.data, result.data)
        pd.testing.assert_frame_equal(loaded.table, result.table)
        figures, before = loaded.figures(), result.figures()
        assert figures
        assert list(figures) == list(before)
        for name, figure in figures.items():
            drawn = str(figure.to_json())
            assert drawn == before[name].to_json()
            valid = str(go.Figure(json.loads(drawn)).to_json())
            assert json.loads(valid) == json.loads(drawn), f"{name} is not valid"
            assert json.loads(drawn)["layout"].get("title", {}).get("text"), f"{name} has no title"

    def test_its_headline_is_one_line(self, result: Result, tmp_path: Path) -> None:
        """The headline is one line of text."""
        line = result.headline()
        assert line == line.strip() != ""
        assert line.isprintable()
        assert load_result(result.save(tmp_path / "result")).headline() == line

    def test_numbers_are_finite_or_nan(self, result: Result) -> None:
        """No number is infinite."""
        for name, values in result.data.data_vars.items():
            array = np.asarray(values)
            assert array.dtype.kind not in "fc" or not np.isinf(array).any(), name
