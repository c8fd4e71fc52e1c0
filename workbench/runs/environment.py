"""Environment of a run: versions, device, threads, the commit of the experiment, and the files its settings name."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from workbench.io.files import sha256_bytes
from workbench.io.torch_state import usable_device
from workbench.results.experiment import identity

_LIBRARIES = ("interp-workbench", "torch", "transformers", "transformer-lens", "sae-lens", "tokenizers", "numpy")
_CONFIGS = ("config.json", "cfg.json")
"""Files that make a folder a model or a sparse autoencoder."""


def environment(source: Path, device: str | None = "cpu") -> dict[str, Any]:
    """Returns Python, platform, device, threads, versions, commit and time, as `environment.json` has them.

    Args:
        source: File of the experiment, whose commit is meant.
        device: Device of the run: cpu, cuda, cuda:1. None: the GPU if there is one.
    """
    import torch  # seconds, which `workbench sweep --help` does not pay

    device = device or usable_device().type
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") and torch.cuda.is_available() else None
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": gpu or f"{device}, {platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "versions": versions,
        **_commit(source),
        "started": utc_now(),
    }


def utc_now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def file_digests(config: Any) -> dict[str, str]:
    """Returns, for each setting that names files or models on this disk, a digest of their names, sizes and times."""
    digests = {}
    for name, value in identity(config).items():
        texts = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str)]
        models = [part for part in texts if any(os.path.isfile(os.path.join(part, file)) for file in _CONFIGS)]
        paths = [part for part in texts if os.path.isfile(part)]
        paths += [entry.path for part in models for entry in os.scandir(part) if entry.is_file()]
        stats = sorted((os.path.basename(path), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths)
        if stats:
            digests[name] = sha256_bytes(json.dumps(stats).encode())[:16]
    return digests


def _commit(source: Path) -> dict[str, Any]:
    """The commit of a file, and whether anything in its repository has changed since; None where git does not know."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)  # or a home folder under git would pass for its repository
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}
