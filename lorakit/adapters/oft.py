"""OFT and BOFT: the weight's outputs turned by block-diagonal rotations."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.adapters import rotated
from lorakit.adapters.checks import alpha_tensor, check_values, number, shapes_of
from lorakit.adapters.rotated import Rotated
from lorakit.errors import AdapterError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Oft:
    """W' = rescale · Rᵀ · W, R block-diagonal; BOFT: R_m ⋯ R_1 · W, each on permuted outputs.

    Args:
        blocks: [blocks, n, n], or [stages, blocks, n, n] of BOFT; skew once transposed and taken
            off. Outputs = blocks · n.
        rescale: None, or a factor for every output.
        alpha: the constraint: ‖Q‖ is at most alpha · outputs, 0 for no bound.
        direct: whether the blocks are the rotations themselves, as LyCORIS stored them at first.
    """

    blocks: Tensor
    rescale: Tensor | None
    alpha: float
    direct: bool = False

    @property
    def kind(self) -> str:
        """'oft' or 'boft'."""
        return "boft" if self.blocks.ndim == 4 else "oft"

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
        """(out, 0): the inputs are the weight's, and not known here."""
        return (int(self.blocks.shape[-3] * self.blocks.shape[-1]), 0)

    def change(self, base: Tensor | None = None) -> Tensor:
        """Return W' − W in fp64.

        Source: arXiv 2306.07280 and 2311.06243; LyCORIS `diag_oft` and `boft`, where 0 leaves Q
        unbounded (sd-scripts takes it for a bound of 0).
        """
        if base is None:
            raise AdapterError(
                f"is {self.kind.upper()}, whose change depends on the weight that it changes; name "
                "the model with --against, or bake the LoRA into it with --into"
            )
        weight = base.double()
        if len(weight) != self.shape[0]:
            raise AdapterError(
                f"expected a weight of {self.shape[0]} outputs, found {len(weight)}; name the "
                "model that it was trained on"
            )
        turned = self._turned(weight)
        if self.rescale is not None:
            turned = turned * self.rescale.double().reshape(-1, 1)
        return turned - weight

    def _turned(self, weight: Tensor) -> Tensor:
        rotations = self._rotations()
        if rotations.ndim == 3:
            count, size, _ = rotations.shape
            blocks = weight.reshape(count, size, -1)
            return torch.einsum("knm,kni->kmi", rotations, blocks).reshape(weight.shape)
        half = rotations.shape[-1] // 2
        for stage, rotation in enumerate(rotations):
            count, size, _ = rotation.shape
            step = 2**stage * half
            places = torch.arange(len(weight), device=weight.device)
            order = places.reshape(-1, 2, step).transpose(1, 2).flatten()
            blocks = weight[order].reshape(count, size, -1)
            back = torch.empty_like(order)
            back[order] = places
            weight = torch.einsum("knm,kmi->kni", rotation, blocks).reshape(weight.shape)[back]
        return weight

    def _rotations(self) -> Tensor:
        """Return the Cayley transform of the skew part, its norm bounded by alpha · outputs."""
        if self.direct:
            return self.blocks.double()
        skew = self.blocks.double() - self.blocks.double().transpose(-1, -2)
        bound = self.alpha * self.shape[0]
        length = float(torch.linalg.vector_norm(skew))
        if 0 < bound < length:
            skew = skew * (bound / length)
        one = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        rotations: Tensor = torch.linalg.solve(one - skew, one + skew, left=False)
        return rotations

    def scaled(self, strength: float, base: Tensor | None = None) -> "Oft":
        """Return itself at strength 1; between a rotation and none there is no rotation."""
        del base
        if strength == 1:
            return self
        raise AdapterError(
            f"is {self.kind.upper()}, which has no strength but 0 and 1 without being made a LoRA; "
            "bake it with --into, or convert it with --as lora --against MODEL first"
        )

    def rows(self, start: int, stop: int) -> "Oft":
        """Return the rotations of some outputs, where the cuts fall between blocks."""
        size = int(self.blocks.shape[-1])
        if self.blocks.ndim == 4 or start % size or stop % size or self.alpha:
            raise AdapterError(
                f"is {self.kind.upper()} over all outputs of a fused layer; bake it into a model "
                "that holds the layer fused, or convert it with --as lora --against MODEL"
            )
        rescale = None if self.rescale is None else self.rescale[start:stop]
        return replace(self, blocks=self.blocks[start // size : stop // size], rescale=rescale)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by role."""
        if self.direct:
            found = {"oft_diag": self.blocks}
        else:
            found = {"oft_blocks": self.blocks, "alpha": alpha_tensor(self.alpha)}
        return found if self.rescale is None else found | {"rescale": self.rescale}


def build(tensors: Mapping[str, Tensor], alpha: float | None) -> Oft | Rotated:
    """Check a module's tensors and make an `Oft` of them, or what PEFT calls so.

    Args:
        tensors: `oft_blocks`, perhaps `rescale` and `alpha`, the constraint; `oft_diag`, the
            rotations of LyCORIS's first form, whose alpha says nothing; or PEFT's.
        alpha: unused: without the tensor there is no constraint.

    Raises:
        AdapterError: the tensors do not fit, or depend on settings that are not here.
        NumericsError: a value is not finite.

    Source: the web UI's reader for `oft_diag`.
    """
    del alpha
    check_values(tensors)
    if any(role in tensors for role in rotated.ROLES):
        return rotated.build(tensors)
    direct = "oft_diag" in tensors
    if direct == ("oft_blocks" in tensors):
        raise AdapterError(f"expected oft_blocks or oft_diag, found {shapes_of(tensors)}")
    blocks = tensors["oft_diag" if direct else "oft_blocks"]
    if direct and blocks.ndim != 3:
        raise AdapterError(f"expected square blocks, found {shapes_of(tensors)}")
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise AdapterError(f"expected square blocks, found {shapes_of(tensors)}")
    if blocks.ndim == 4 and not _is_butterfly(*map(int, blocks.shape[:3])):
        raise AdapterError(
            "expected blocks of an even size and outputs that every stage of BOFT cuts in halves, "
            f"found {shapes_of(tensors)}"
        )
    rescale = tensors.get("rescale")
    if rescale is not None and rescale.numel() != blocks.shape[-3] * blocks.shape[-1]:
        raise AdapterError(f"expected a rescale for every output, found {shapes_of(tensors)}")
    constraint = number(tensors["alpha"]) if "alpha" in tensors and not direct else 0.0
    return Oft(blocks=blocks, rescale=rescale, alpha=constraint, direct=direct)


def _is_butterfly(stages: int, count: int, size: int) -> bool:
    """Tell whether the widest stage, of strides 2^stages · size / 2, divides the outputs."""
    return size % 2 == 0 and (count * size) % (2**stages * (size // 2)) == 0
