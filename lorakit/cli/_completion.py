"""What a shell offers when TAB is pressed: files where a LoRA or a model is meant, and names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

Completer = Callable[["click.Context", "click.Parameter", str], "list[CompletionItem[str]]"]
DEVICES = ("auto", "cpu", "cuda", "mps")
_TENSORS = (".safetensors", ".json", ".ckpt", ".pt", ".pth", ".bin")


def complete_path(
    ctx: "click.Context", param: "click.Parameter", incomplete: str
) -> "list[CompletionItem[str]]":
    """Let the shell complete the path of PATH[:STRENGTH]."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def complete_sum(
    ctx: "click.Context", param: "click.Parameter", incomplete: str
) -> "list[CompletionItem[str]]":
    """Complete the last path of PATH[+LORA]...; a path that itself holds a + is whole."""
    from click.shell_completion import CompletionItem

    before, plus, last = incomplete.rpartition("+")
    if not plus or _beginning_with(incomplete):
        return complete_path(ctx, param, incomplete)
    return [CompletionItem(f"{before}+{found}") for found in _beginning_with(last)]


def complete_names(names: Sequence[str]) -> Completer:
    """Complete one of these names, where something else may be given too."""

    def complete(
        ctx: "click.Context", param: "click.Parameter", incomplete: str
    ) -> "list[CompletionItem[str]]":
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in names if name.startswith(incomplete)]

    return complete


def _beginning_with(text: str) -> list[str]:
    """Return the folders and the files of tensors whose path begins so, as it was typed."""
    start = "" if text.endswith(("/", "\\")) else Path(text).name
    typed = text.removesuffix(start)
    try:
        found = sorted(Path(typed or ".").iterdir())
    except OSError:
        return []
    inside = [place for place in found if place.name.startswith(start)]
    folders = [f"{typed}{place.name}/" for place in inside if place.is_dir()]
    files = [place for place in inside if place.suffix.lower() in _TENSORS and place.is_file()]
    return folders + [typed + place.name for place in files]
