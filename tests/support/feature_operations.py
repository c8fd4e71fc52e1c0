"""Extraction and export of features for crash points: a store of 51 rows, an SAE of 20 features."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from crash_points import Operation
from features_example import SEGMENTS, SITE, TRAINED
from sae_example import save_sae
from store_example import contents as bytes_of
from store_example import write_store


def without_scratch(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of all files but those in hidden folders, which a killed process cannot remove."""
    files = bytes_of(folder)
    return {
        name: data for name, data in files.items() if not any(part.endswith(".partial") for part in name.split("/"))
    }


def _sae(folder: Path) -> Any:
    from workbench.sae.load import load_sae

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_sae(save_sae(folder / "sae", "topk", **TRAINED), device="cpu")


def _loaded(folder: Path) -> None:
    """Loads what every trial needs, before the forks."""
    import numpy as np

    from workbench.features.extract import extract_features
    from workbench.store.reader import open_store

    store = open_store(write_store(folder / "warm.acts", SEGMENTS, sites=(SITE,)))
    features = extract_features(store, _sae(folder), show_progress=False)
    assert features is not None
    features[np.arange(3)]


def readable_features(folder: Path) -> None:
    """Raises where features that have their name cannot be read."""
    import numpy as np

    from workbench.features.feature_store import open_features

    for record in folder.glob("x.acts/features/[!.]*/features.json"):
        features = open_features(record.parent)
        features[np.arange(len(features))]


def extraction(**settings: Any) -> Operation:
    """An extraction in two segments."""
    import tempfile

    import workbench.features.encoding as encoding
    from workbench.features.extract import extract_features
    from workbench.store.reader import open_store

    warm = Path(tempfile.mkdtemp(prefix="crash-points-warm-"))
    _loaded(warm)
    sae = _sae(warm)
    encoding.SEGMENT_ROWS = 20

    def begin(folder: Path) -> None:
        write_store(folder / "x.acts", SEGMENTS, sites=(SITE,))

    def work(folder: Path) -> None:
        features = extract_features(open_store(folder / "x.acts"), sae, show_progress=False, **settings)
        assert features is not None
        assert len(features) == 51

    return Operation(work, begin=begin, check=readable_features)


def while_recording() -> Operation:
    """A recording that extracts the features of a site on the way."""
    import tempfile

    from features_example import TRAINED
    from recorded_operations import SETTINGS, TEXTS, tiny_model

    from workbench.recording.record import record
    from workbench.sae.load import load_sae

    model = tiny_model()
    warm = Path(tempfile.mkdtemp(prefix="crash-points-warm-"))
    about = TRAINED | {"d_in": 16, "d_sae": 20, "hook_name": "blocks.0.hook_resid_post", "model_name": "tiny"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = load_sae(save_sae(warm / "sae", "topk", **about), device="cpu")
    record(model, TEXTS, out=warm / "s.acts", sae=sae, show_progress=False, **SETTINGS)

    def work(folder: Path) -> None:
        store = record(model, TEXTS, out=folder / "x.acts", sae=sae, show_progress=False, **SETTINGS)
        assert store.rows == sum(map(len, TEXTS))

    def check(folder: Path) -> None:
        from recorded_operations import readable

        readable(folder)
        readable_features(folder)

    return Operation(work, check=check)


def delphi_export() -> Operation:
    """An export of all features to delphi's files; what is there is complete, and is not written again."""
    import tempfile

    from workbench.features.extract import extract_features
    from workbench.features.feature_store import open_features
    from workbench.features.other_formats import export_delphi
    from workbench.store.reader import open_store

    warm = Path(tempfile.mkdtemp(prefix="crash-points-warm-"))
    _loaded(warm)
    sae = _sae(warm)

    def begin(folder: Path) -> None:
        extract_features(open_store(write_store(folder / "x.acts", SEGMENTS, sites=(SITE,))), sae, show_progress=False)

    def work(folder: Path) -> None:
        if not (folder / "out" / SITE.name).exists():
            export_delphi(open_features(folder / "x.acts"), folder / "out", splits=3, show_progress=False)

    return Operation(work, begin=begin, check=readable_features, contents=without_scratch)
