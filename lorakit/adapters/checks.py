"""What every kind of adapter asks of its tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lorakit.errors import AdapterError, NumericsError
from lorakit.names.specs import LARGEST

NUMBERS = ("alpha", "scale", "on_input")
_BITS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
}
"""The integers of the same width, and the bits of infinity."""


def number(tensor: Tensor) -> float:
    """Return the value of a tensor of one element."""
    return float(tensor.reshape(-1)[0].item())


def alpha_tensor(alpha: float) -> Tensor:
    """Return alpha as a scalar in fp32: bf16 does not hold 301."""
    return torch.tensor(alpha, dtype=torch.float32)


def needed(tensors: Mapping[str, Tensor], *roles: str) -> list[Tensor]:
    """Return the tensors of these roles.

    Raises:
        AdapterError: one is missing.
    """
    missing = [role for role in roles if role not in tensors]
    if missing:
        raise AdapterError(
            f"has no {missing[0]} beside its {', '.join(sorted(tensors))}; "
            "the file is incomplete, get it again from where it was made"
        )
    return [tensors[role] for role in roles]


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Check that factors are finite floats and that numbers are single.

    Raises:
        AdapterError: a tensor is of another dtype or size.
        NumericsError: a value is not finite.
    """
    for role, tensor in tensors.items():
        if role in NUMBERS:
            if tensor.numel() != 1 or tensor.is_complex():
                found = tensor.dtype if tensor.is_complex() else list(tensor.shape)
                raise AdapterError(f"expected one number as {role}, found {found}")
        elif not tensor.is_floating_point():
            raise AdapterError(f"expected floats in {role}, found {tensor.dtype}")
        elif not tensor.numel() or not tensor.ndim:
            raise AdapterError(f"expected values in {role}, found {list(tensor.shape)}")
        if not finite(tensor):
            raise NumericsError(
                f"holds NaN or infinity in its {role}; the training diverged or the file is broken"
            )
        if role in NUMBERS and tensor.device.type != "meta" and abs(number(tensor)) > LARGEST:
            raise NumericsError(
                f"expected a number of at most {LARGEST:g} as {role}, found {number(tensor):g}"
            )


def finite(tensor: Tensor) -> bool:
    """Tell whether every value is finite; tensors without values (torch's meta device) are.

    What is not finite has the largest bits of its sign: two maxima of integers tell it, in half
    the time of a sum.
    """
    if tensor.device.type == "meta" or not tensor.is_floating_point() or not tensor.numel():
        return True
    # All arithmetic is of fp32's range: what lies beyond it is infinite.
    values = tensor if tensor.dtype.itemsize in (2, 4) else tensor.float()
    width, infinity = _BITS[values.dtype]
    bits = values.detach().cpu().contiguous().view(width).numpy()
    negative = bits.view(f"u{bits.dtype.name}")
    below = 1 << (8 * values.element_size() - 1)
    return int(bits.max()) < infinity and int(negative.max()) < below + infinity


def shapes_of(tensors: Mapping[str, Tensor]) -> str:
    """Say the shapes of tensors, for a message."""
    return ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in sorted(tensors.items()))


def base_of(base: Tensor | None, shape: tuple[int, ...], kind: str) -> Tensor:
    """Return the weight that a change is taken on, [out, in · kh · kw] in fp64.

    Raises:
        AdapterError: there is none, or it has another shape.
    """
    if base is None:
        raise AdapterError(
            f"is {kind}, whose change depends on the weight that it changes; name the model with "
            "--against, or bake the LoRA into it with --into"
        )
    if tuple(base.shape) != (shape[0], math.prod(shape[1:])):
        raise AdapterError(
            f"expected a weight of {list(shape)}, found {list(base.shape)}; name the model that it "
            "was trained on"
        )
    return base.double()
