"""The same model in both layouts, by our tables: what diffusers' own converters must agree with."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lorakit.names.architectures import ModuleName


def original_layout(
    names: Iterable[ModuleName], diffusers: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename, join, turn and swap a component's tensors to the original single file's.

    Args:
        names: the architecture's table.
        diffusers: path -> tensor of the component, as `state_dict()` has them.

    A weight that no name claims is left out; the test sees it missing on the other side.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name in names:
        for kind in ("weight", "bias"):
            tensor = diffusers.get(f"{name.path}.{kind}")
            if tensor is None:
                continue
            if name.swap:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            if name.transpose and tensor.ndim > 1:
                tensor = tensor.T
            parameter = name.parameter.replace("weight", kind) if kind == "bias" else name.parameter
            parts.setdefault(name.original + parameter, []).append(
                (name.part[0] if name.part else 0, tensor)
            )
    return {
        key: torch.cat([tensor for _, tensor in sorted(held, key=lambda at: at[0])])
        for key, held in parts.items()
    }
