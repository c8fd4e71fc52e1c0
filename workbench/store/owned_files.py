"""Names of all files that a store may have: what is none of them belongs to others, and is never removed."""

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
    "features/*/*.safetensors",
    "features/*/*.json",
    "features/*/*.parquet",
    "features/.*.partial/*",
    "features/.*.partial/segments/*",
)
