"""Names of all files that a store may have: what is none of them belongs to others, and is never removed."""

from pathlib import Path

from workbench.io.errors import RequestError

FEATURE_FILES = ("features.json", "labels.json", "by_row*.safetensors", "by_feature*.safetensors")
"""Files of a folder of features."""

STORE_FILES = (
    "manifest.json",
    "unembed.safetensors",
    ".*.partial",
    ".*.partial/*",
    "tokens*.partial/*",
    "segments/*.json",
    "segments/*/tokens.parquet",
    "segments/*/segment*.json",
    "segments/*/*.safetensors",
    "segments/.*.partial/*",
    "tokens/*.parquet",
    "tokens/.*.partial/*",
    *(f"features/*/{name}" for name in FEATURE_FILES),
    "features/.*.partial/*",
    "features/.*.partial/segments/*",
    *(f"lenses/*/{name}" for name in ("lens.json", "maps.safetensors")),
    "lenses/.*.partial/*",
)


def refuse_store(folder: Path) -> None:
    """Refuses a folder for other files that is a store, in which they would be files of others."""
    if (folder / STORE_FILES[0]).is_file():
        raise RequestError(f"folder {str(folder)!r} is a store; choose another one")
