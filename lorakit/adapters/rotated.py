"""PEFT's OFT and BOFT: the weight's inputs turned by block-diagonal rotations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.adapters.checks import check_values, shapes_of
from lorakit.errors import AdapterError
from lorakit.linalg.rotations import cayley

ROLES = ("oft_R", "boft_R")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotated:
    """W' = rescale · W · Rᵀ, R = R_m ⋯ R_1, each block-diagonal on inputs in an order of its own.

    Args:
        rotations: [stages, blocks, n, n]; one block may stand for all.
        rescale: None, or BOFT's factor for every output.
    """

    rotations: Tensor
    rescale: Tensor | None = None

    @property
    def kind(self) -> str:
        """'oft of inputs' or 'boft of inputs'."""
        return "oft of inputs" if self.rescale is None else "boft of inputs"

    @property
    def rank(self) -> int | None:
        """None: there are no factors of low rank."""
        return None

    @property
    def needs_base(self) -> bool:
        """True."""
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        """(out or 0, 0): the inputs and the kernel are the weight's, and not known here."""
        return (0 if self.rescale is None else self.rescale.numel(), 0)

    def change(self, base: Tensor | None = None) -> Tensor:
        """Return W' − W in fp64.

        Source: PEFT 0.21.2, `OFTLayer` and `BOFTLayer`.
        """
        if base is None:
            raise AdapterError(
                f"is {self.kind}, whose change depends on the weight that it changes; name the "
                "model with --against, or bake the LoRA into it with --into"
            )
        weight = base.double()
        size = int(self.rotations.shape[-1])
        count = int(self.rotations.shape[1])
        inputs = weight.shape[1]
        if inputs % size or count not in (1, inputs // size):
            raise AdapterError(
                f"expected a weight of {count * size} inputs, found {inputs}; name the model that "
                "it was trained on"
            )
        turned = weight.T
        for stage, rotation in enumerate(self.rotations.double()):
            order = _order(inputs, size, stage, device=weight.device)
            blocks = torch.empty_like(turned)
            blocks[order] = turned
            whole = (rotation @ blocks.reshape(inputs // size, size, -1)).reshape(blocks.shape)
            turned = whole[order]
        turned = turned.T
        if self.rescale is not None:
            turned = turned * self.rescale.double().reshape(-1, 1)
        return turned - weight

    def scaled(self, strength: float, base: Tensor | None = None) -> "Rotated":
        """Return itself at strength 1; between a rotation and none there is no rotation."""
        del base
        if strength == 1:
            return self
        raise AdapterError(
            f"is {self.kind}, which has no strength but 0 and 1 without being made a LoRA; bake it "
            "with --into, or convert it with --as lora --against MODEL first"
        )

    def rows(self, start: int, stop: int) -> "Rotated":
        """Return the adapter of some outputs: their inputs are turned alike."""
        rescale = None if self.rescale is None else self.rescale[start:stop]
        return replace(self, rescale=rescale)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by role."""
        found = {"rotations": self.rotations}
        return found if self.rescale is None else found | {"boft_s": self.rescale}


def _order(inputs: int, size: int, stage: int, *, device: torch.device) -> Tensor:
    """Return the place among a stage's blocks of each input: halves of blocks, even ones first."""
    half = size // 2
    if stage == 0 or not half:
        return torch.arange(inputs, device=device)
    wide = size * 2**stage
    halves = torch.arange(wide, device=device).reshape(-1, half)
    inside = torch.cat((halves[::2], halves[1::2])).flatten()
    starts = torch.arange(0, inputs, wide, device=device)
    return (starts[:, None] + inside[None, :]).flatten()


def build(tensors: Mapping[str, Tensor]) -> Rotated:
    """Check a module's tensors and make a `Rotated` of them.

    Args:
        tensors: `oft_R`, the rotations that the folder's configuration makes of the numbers, or
            `boft_R` and `boft_s`, which need no configuration.

    Raises:
        AdapterError: the tensors do not fit, or are numbers without their configuration.
        NumericsError: a value is not finite.
    """
    check_values(tensors)
    if "oft_R" in tensors and tensors["oft_R"].ndim == 4:
        return Rotated(rotations=tensors["oft_R"])
    blocks, rescale = tensors.get("boft_R"), tensors.get("boft_s")
    if blocks is None or rescale is None:
        raise AdapterError(
            f"is PEFT's OFT ({shapes_of(tensors)}), whose settings are in an adapter_config.json "
            "that is not here; name the folder, or merge it with the tool that made it"
        )
    if blocks.ndim != 4 or blocks.shape[-1] != blocks.shape[-2]:
        raise AdapterError(f"expected square blocks, found {shapes_of(tensors)}")
    stages, count, size = map(int, blocks.shape[:3])
    if stages > 1 and (size % 2 or math.gcd(count, 2 ** (stages - 1)) < 2 ** (stages - 1)):
        raise AdapterError(
            "expected blocks of an even size, as many as every stage of BOFT cuts in halves, "
            f"found {shapes_of(tensors)}"
        )
    if blocks.device.type == "meta":
        return Rotated(rotations=blocks, rescale=rescale)
    skew = (blocks.double() - blocks.double().transpose(-1, -2)) / 2
    turned = cayley(skew.flatten(0, 1)).reshape(blocks.shape)
    return Rotated(rotations=turned.float(), rescale=rescale)
