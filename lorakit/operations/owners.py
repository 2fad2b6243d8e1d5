"""What names a LoRA's random masks: what it changes, however it is written and named."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from lorakit.adapters import Adapter
from lorakit.linalg.factored import Factors, norm
from lorakit.lorafile import LoraFile
from lorakit.operations.strength import Strength, size_of

_STEPS = 512
"""An octave of Σ‖ΔW‖² in so many steps: 0.14 % each."""


def owners_of(
    stack: Sequence[tuple[LoraFile, float | Strength]], *, random: bool = False
) -> tuple[str, ...]:
    """Return a name for each entry of a stack; the second use of a name gets `#2`, and so on.

    The uses of one name are counted in the order of their strengths' sizes, so that neither the
    order of the arguments nor a common factor of all strengths changes anything.

    Args:
        stack: (LoRA, strength) pairs.
        random: whether the names are those of random masks: then how a LoRA is factored must not
            count, see `likeness`. Else they only sort the stack.
    """
    files = {id(lora): lora for lora, _ in stack}
    contents = {name: content(lora) for name, lora in files.items()}
    likes = {name: likeness(lora) for name, lora in files.items()} if random else contents
    keys = [
        (likes[id(lora)], size_of(strength), repr(strength), contents[id(lora)])
        for lora, strength in stack
    ]
    seen: Counter[str] = Counter()
    names = [""] * len(stack)
    for index in sorted(range(len(stack)), key=lambda i: keys[i]):
        name = keys[index][0]
        seen[name] += 1
        names[index] = name if seen[name] == 1 else f"{name}#{seen[name]}"
    return tuple(names)


def content(lora: LoraFile) -> str:
    """Return a hash of the adapters: modules, roles, dtypes, shapes, bytes.

    kohya's, PEFT's and ComfyUI's file of one LoRA have one content; the same ΔW in other factors
    is other content. A LoRA of which only the header was read has none: an empty text.
    """
    return _hashed(lora.adapters.items())


def likeness(lora: LoraFile) -> str:
    """Return a hash that is the same for the same ΔW in other factors, (10 · up, down / 10).

    Of what is a product of factors the sum of all ‖ΔW‖² counts, to a step of 0.14 %: the rounding
    of other factors moves it over a step in one of 100,000 LoRAs in fp32, of 1,000 in fp16. Of all
    else the bytes count. Different LoRAs may have one likeness: they are counted as its uses.
    """
    squares, others = [], []
    for module, adapter in lora.adapters.items():
        if any(tensor.device.type == "meta" for tensor in adapter.tensors().values()):
            return ""
        change = None if adapter.needs_base else adapter.change()
        if isinstance(change, Factors):
            squares.append(norm(change) ** 2)
        else:
            others.append((module, adapter))
    whole = math.fsum(squares)
    step = round(_STEPS * math.log2(whole)) if whole else None
    return _hashed(others, f"{step}\n")


def _hashed(adapters: Iterable[tuple[str, Adapter]], more: str = "") -> str:
    digest = blake2b(more.encode(), digest_size=16)
    for module, adapter in sorted(adapters, key=lambda item: item[0]):
        for role, tensor in sorted(adapter.tensors().items()):
            if tensor.device.type == "meta":
                return ""
            digest.update(f"{module}\n{role}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
