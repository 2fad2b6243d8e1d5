"""The pictures of docs/inspect.md: `python docs/pictures.py` draws them anew.

They are of seeded LoRAs with SDXL's names, which act where real ones do.
"""

import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import synthetic  # noqa: E402

from lorakit.cli._inspect_page import as_svg  # noqa: E402
from lorakit.names.blocks import block_of  # noqa: E402
from lorakit.names.kinds import kind_of  # noqa: E402
from lorakit.names.lorakeys import read_keys  # noqa: E402
from lorakit.operations.inspect import inspect  # noqa: E402
from lorakit.operations.inspection import Inspection  # noqa: E402

IMAGES = ROOT / "docs" / "images"
ORDER = ("BASE", "IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{block:02}" for block in range(6)))
STYLE = {"attn1": 0.7, "attn2": 1.0, "ff": 0.8, "proj": 0.5, "text_encoder_2": 1.5}
CHARACTER = {"attn1": 1.0, "attn2": 0.6, "ff": 1.4, "proj": 0.5, "text_encoder_2": 1.5}


def shaped(
    tensors: Mapping[str, Tensor], *, peak: int, kinds: Mapping[str, float]
) -> dict[str, Tensor]:
    """Scale a LoRA's layers, most around a block, and let its singular values fall."""
    keys = read_keys({key: tuple(tensor.shape) for key, tensor in tensors.items()}, {})
    found = dict(tensors)
    for module, spellings in keys.modules.items():
        block = ORDER.index(block_of(module, keys.architecture))
        size = kinds[kind_of(module)] * math.exp(-(((block - peak) / 3.5) ** 2))
        up, down = (spellings[0].keys[role] for role in ("up", "down"))
        frame = torch.linalg.qr(tensors[up].float())[0]
        falling = size * (0.7 + 0.015 * block) ** torch.arange(frame.shape[1])
        found[up] = (frame * falling).half()
        found[down] = torch.linalg.qr(tensors[down].float().T)[0].T.half()
    return found


def look(name: str, *, rank: int, seed: int, peak: int, kinds: Mapping[str, float]) -> Inspection:
    """Make a LoRA, and inspect it."""
    tensors = synthetic.lora_tensors("sdxl", rank=rank, alpha=rank / 2, seed=seed, factor=32)
    tensors = {key: tensor for key, tensor in tensors.items() if "_te1_" not in key}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        synthetic.write_lora(path, shaped(tensors, peak=peak, kinds=kinds))
        return replace(inspect(path, blocks=True, spectrum=True), path=name)


def pictures() -> dict[str, str]:
    """Return the pictures by name."""
    style = look("style.safetensors", rank=16, seed=1, peak=7, kinds=STYLE)
    character = look("character.safetensors", rank=12, seed=2, peak=3, kinds=CHARACTER)
    return {"inspect-one.svg": as_svg([style]), "inspect-two.svg": as_svg([style, character])}


def main() -> None:
    """Write them."""
    IMAGES.mkdir(exist_ok=True)
    for name, text in pictures().items():
        (IMAGES / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
