"""What names a LoRA's random masks: its content, whatever its file, dialect and place."""

from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b

import torch

from lorakit.lorafile import LoraFile
from lorakit.operations.strength import Strength


def owners_of(stack: Sequence[tuple[LoraFile, float | Strength]]) -> tuple[str, ...]:
    """Return a name for each entry of a stack; the second use of a LoRA gets `#2`, and so on.

    The uses of one LoRA are counted in the order of their strengths, so that the order of the
    arguments changes nothing.
    """
    contents = {id(lora): content(lora) for lora, _ in stack}
    ranked = sorted(range(len(stack)), key=lambda i: (contents[id(stack[i][0])], repr(stack[i][1])))
    seen: Counter[str] = Counter()
    names = [""] * len(stack)
    for index in ranked:
        name = contents[id(stack[index][0])]
        seen[name] += 1
        names[index] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return tuple(names)


def content(lora: LoraFile) -> str:
    """Return a hash of the adapters: modules, roles, dtypes, shapes, bytes.

    kohya's, PEFT's and ComfyUI's file of one LoRA have one content; the same ΔW in other factors
    is other content. A LoRA of which only the header was read has none: an empty text.
    """
    digest = blake2b(digest_size=16)
    for module in sorted(lora.adapters):
        for role, tensor in sorted(lora.adapters[module].tensors().items()):
            if tensor.device.type == "meta":
                return ""
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{module}\n{role}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
