"""Which layers an extraction takes."""

import re
from dataclasses import dataclass

from lorakit.errors import AdapterError, SpecError
from lorakit.peftpatterns import LONGEST


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which layers an extraction takes, and how.

    Args:
        convs: take kernels over 1x1 too (LoCon).
        only: regular expressions; a layer's name or block id must match one.
        exclude: regular expressions; none may match.
        kind: "lora" or "dora" of a rank, or "full" for ΔW itself, biases and norms too.
        min_change: leave out a layer whose ‖ΔW‖ / ‖W‖ is below; 0 leaves out equal layers only.
        svd: "auto", "exact" or "fast".
        dtype: safetensors' name of what is stored; of two models alone, a LoRA's own is kept.
    """

    convs: bool = True
    kind: str = "lora"
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_change: float = 0.0
    svd: str = "auto"
    dtype: str = "F16"

    def takes(self, module: str, block: str) -> bool:
        """Tell whether the expressions choose a layer.

        Raises:
            SpecError: one is no regular expression.
            AdapterError: the name is longer than any, so that searching it could take very long.
        """
        if (self.only or self.exclude) and len(module) > LONGEST:
            raise AdapterError(
                f"{module[:60]}... expected a name of at most {LONGEST} letters, found "
                f"{len(module)}; the file is damaged, or leave --only and --exclude out."
            )
        names = (module, block)
        try:
            wanted = not self.only or any(re.search(p, n) for p in self.only for n in names)
            return wanted and not any(re.search(p, n) for p in self.exclude for n in names)
        except re.error as error:
            raise SpecError(f"--only and --exclude take regular expressions: {error}.") from None
