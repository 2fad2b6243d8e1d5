"""safetensors' dtypes as torch has them."""

import torch
from torch import Tensor

from lorakit.errors import FileFormatError
from lorakit.tensorfile.header import Spec

_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
# An older torch lacks the youngest of them.
_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, attribute)
    for name, attribute in _NAMES.items()
    if hasattr(torch, attribute)
}
_STORED = {dtype: name for name, dtype in _TORCH.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a name of safetensors.

    Raises:
        FileFormatError: torch has none.
    """
    if name not in _TORCH:
        raise FileFormatError(
            f"Expected a dtype that torch {torch.__version__} has, found {name}; "
            "convert the file to fp16 or bf16 first."
        )
    return _TORCH[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name for a dtype of torch.

    Raises:
        FileFormatError: safetensors has none.
    """
    if dtype not in _STORED:
        raise FileFormatError(
            f"Expected a dtype that safetensors has, found {dtype}; convert the tensor first."
        )
    return _STORED[dtype]


def spec_of(tensor: Tensor) -> Spec:
    """Return a tensor's spec; torch counts two elements of F4 as one."""
    name = dtype_name(tensor.dtype)
    shape = tuple(tensor.shape)
    return Spec(name, (*shape[:-1], 2 * shape[-1]) if name == "F4" and shape else shape)


def empty(spec: Spec) -> Tensor:
    """Return an uninitialised tensor of a spec."""
    shape = spec.shape
    if spec.dtype == "F4":
        if not shape or shape[-1] % 2:
            raise FileFormatError(
                f"Expected an even last size of an F4 tensor, found {list(shape)}; "
                "convert the file to fp16 or bf16 first."
            )
        shape = (*shape[:-1], shape[-1] // 2)
    return torch.empty(shape, dtype=torch_dtype(spec.dtype))


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, shared with it."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
