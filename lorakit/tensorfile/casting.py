"""The one rounding: from what was computed to what is stored."""

from collections.abc import Callable

import torch
from torch import Tensor

from lorakit.errors import NumericsError
from lorakit.linalg.rounding import to_odd
from lorakit.linalg.tiles import summable
from lorakit.tensorfile.dtypes import spec_of, torch_dtype
from lorakit.tensorfile.plain import TensorSource, root_of

# The least magnitudes that no longer round to the largest number of a dtype without infinity, or
# one whose cast saturates in some versions of torch: half a step above it, ties going to even.
_FP8_LIMITS = {"F8_E4M3": 464.0, "F8_E5M2": 61440.0}
_TIE_FITS = {"F8_E4M3"}


def cast(tensor: Tensor, dtype: str, key: str) -> Tensor:
    """Round a computed tensor once to a stored dtype.

    Args:
        tensor: any shape, any floating dtype; float64 is rounded directly, not through float32.
        dtype: safetensors' name.
        key: what the error calls it.

    Raises:
        NumericsError: a value is NaN or infinite, or does not fit the dtype.
    """
    result = _round(tensor, dtype, key)
    if not is_finite(result):
        raise NumericsError(_explain(tensor, dtype, key))
    return result


def stored(source: TensorSource, key: str) -> Tensor:
    """Return a tensor as it is stored: of the source's spec, contiguous, on the CPU.

    A value that was NaN or infinite in the stored source that this one derives from (an attention
    mask, say) passes; a new one does not, nor one in a tensor that the source changes.

    Raises:
        NumericsError: a value became NaN or infinite, was so in a tensor that is changed, or does
            not fit the dtype.
    """
    spec = source.specs[key]
    value = source.get(key)
    try:
        result = _round(value, spec.dtype, key).cpu().contiguous()
    except NumericsError as error:
        raise NumericsError(f"{source.name}: {error}") from None
    if spec_of(result) != spec:
        raise NumericsError(
            f"{source.name}: {key} expected {list(spec.shape)}, found {list(result.shape)}; "
            "the change does not fit this model."
        )
    root = root_of(source)
    if root is source and result.dtype == value.dtype:
        return result
    if not is_finite(result):
        origin = value if root is source else root.get(key)
        if changes(source, key) or not torch.equal(_odd(result), _odd(origin)):
            raise NumericsError(f"{source.name}: {_explain(value, spec.dtype, key)}")
    return result


def changes(source: TensorSource, key: str) -> bool:
    """Tell whether a source says that a tensor has other values there than where it is stored."""
    asked: Callable[[str], bool] | None = getattr(source, "changes", None)
    return asked is not None and asked(key)


def _round(tensor: Tensor, dtype: str, key: str) -> Tensor:
    target = torch_dtype(dtype)
    if tensor.dtype == target:
        return tensor
    if not tensor.is_floating_point() or not target.is_floating_point or dtype in ("F4", "F8_E8M0"):
        raise NumericsError(
            f"{key}: expected a floating dtype to round to, found {tensor.dtype} and {dtype}; "
            "store this tensor in its own dtype."
        )
    if tensor.dtype == torch.float64 and target != torch.float32:
        tensor = to_odd(tensor)
    if dtype not in _FP8_LIMITS:
        return tensor.to(target)
    value = tensor.float()
    largest = _largest(value)
    if largest > _FP8_LIMITS[dtype] or (largest == _FP8_LIMITS[dtype] and dtype not in _TIE_FITS):
        raise NumericsError(_explain(tensor, dtype, key))
    top = torch.finfo(target).max
    return value.clamp(-top, top).to(target)


def _largest(value: Tensor) -> float:
    """Return the largest magnitude; a NaN counts as infinite."""
    if not value.numel():
        return 0.0
    low, high = torch.aminmax(value)
    largest = max(-float(low), float(high))
    return largest if largest == largest else float("inf")


def is_finite(value: Tensor) -> bool:
    """Tell whether no value is NaN or infinite."""
    if not (value.is_floating_point() or value.is_complex()):
        return True
    if value.is_complex():
        value = torch.view_as_real(value)
    # aminmax is the one pass that needs no temporary, and it hands NaN on.
    return _largest(summable(value)) < float("inf")


def _odd(value: Tensor) -> Tensor:
    return ~summable(value).isfinite()


def _explain(tensor: Tensor, dtype: str, key: str) -> str:
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    if not is_finite(wide):
        count = int(_odd(wide).sum())
        return (
            f"{key}: expected finite values, found {count} that are NaN or infinite; check the "
            "inputs for damage and the strengths, and try --dtype fp32 or bf16."
        )
    return (
        f"{key}: the largest value {_largest(wide):.6g} overflows {dtype}; "
        "use --dtype fp32 or bf16."
    )
