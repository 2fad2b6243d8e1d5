"""Models that no table names: their blocks are numbered by their own layers."""

from collections.abc import Iterable

from lorakit.names.architectures import Architecture, ModuleName
from lorakit.names.blocks import BASE, OTHER, block_of


def generic(modules: Iterable[str]) -> Architecture:
    """Return what is known of a model from its modules' names alone: the ids of its blocks."""
    found = {block_of(module, None) for module in modules}
    numbers = [int(block[1:]) for block in found if block not in (BASE, OTHER)]
    layers = [f"B{number:02}" for number in range(max(numbers, default=-1) + 1)]
    return Architecture(
        id="generic",
        title="a model of no known architecture",
        base_model_version="",
        modelspec="",
        build=_nothing,
        roots=(),
        kohya_original=False,
        clips={},
        places={},
        blocks=(BASE, *layers, OTHER),
        block=_block,
    )


def _block(module: str) -> str:
    return block_of(module, None)


def _nothing() -> tuple[ModuleName, ...]:
    return ()
