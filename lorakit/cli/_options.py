"""The options that commands share, read into two dataclasses."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from lorakit.cli._completion import DEVICES, complete_names, complete_path
from lorakit.cli._guard import guarded
from lorakit.cli._pages import keep_pages
from lorakit.cli._shell import Named
from lorakit.errors import SpecError

if TYPE_CHECKING:
    from lorakit.compute import Compute
    from lorakit.linalg.ranks import RankRule

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = {
    "keep": None,
    "fp32": "F32",
    "fp16": "F16",
    "bf16": "BF16",
    "fp8_e4m3fn": "F8_E4M3",
    "fp8_e5m2": "F8_E5M2",
}
_LARGEST = 1e15
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The options that every writing command has.

    `title` and `recipe` are no options: they are of the file that `merge --recipe` repeats.
    """

    output: Path
    overwrite: bool
    dtype: str | None
    device: str
    threads: int | None
    memory: int | None
    dry_run: bool
    verify: bool
    metadata: dict[str, str]
    no_metadata: bool
    allow_unmatched: bool
    json: bool
    quiet: bool
    verbose: int
    title: str | None = None
    recipe: Mapping[str, Any] | None = None

    def compute(self) -> "Compute":
        """Choose the device, the workers and the bytes in flight; what is made is only saved."""
        from lorakit.compute import Compute

        chosen = Compute.of(device=self.device, threads=self.threads, memory=self.memory)
        return replace(chosen, narrow=True)


class Size(click.ParamType[int]):
    """A number of bytes: 800M, 1.5GiB, 73400320."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Read the number and its unit; K, M, G and T are powers of 1024."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?B)?\s*", str(value), re.I)
        if found is None or not 0 < float(found[1]) < _LARGEST:
            self.fail(f"{value!r} is no size; write 800M, 1.5G or a number of bytes.", param, ctx)
        return int(float(found[1]) * _UNITS[found[2].upper()])


def _metadata(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, str]:
    pairs = {}
    for value in values:
        key, sign, text = value.partition("=")
        if not sign or not key:
            raise click.BadParameter(f"{value!r} is no KEY=VALUE.", ctx, param)
        pairs[key] = text
    return pairs


device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    shell_complete=complete_names(DEVICES),
    help="Where the linear algebra runs: auto, cpu, cuda, cuda:N or mps.",
)

_WRITING: tuple[Callable[[F], F], ...] = (
    click.option(
        "-o",
        "--output",
        required=True,
        type=Named(path_type=Path),
        help="What to write. An existing file needs --overwrite; an input is refused always.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
    click.option(
        "--dtype",
        type=click.Choice(tuple(DTYPES)),
        default="keep",
        show_default=True,
        help="Stored dtype; keep takes the input's own (an extracted LoRA: fp16).",
    ),
    device_option,
    click.option("--threads", type=click.IntRange(min=1), help="Workers; a core each if left out."),
    click.option("--memory", type=Size(), help="Bytes in flight at once, such as 256M or 2G."),
    click.option("--dry-run", is_flag=True, help="Show the plan; read headers, write nothing."),
    click.option("--verify", is_flag=True, help="Read the output back and recompute every layer."),
    click.option(
        "--metadata",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_metadata,
        help="Set a metadata key of the output; may be repeated.",
    ),
    click.option("--no-metadata", is_flag=True, help="Write no training metadata and no recipe."),
    click.option(
        "--allow-unmatched",
        is_flag=True,
        help="Go on when something has no place in the output; it is listed and counted.",
    ),
    click.option("--json", is_flag=True, help="The report as one JSON object on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No table and no progress."),
    click.option("-v", "--verbose", count=True, help="A line a layer; -vv shows tracebacks."),
)

_RANKS: tuple[Callable[[F], F], ...] = (
    click.option("--rank", type=click.IntRange(min=1), help="Directions a layer keeps, or a cap."),
    click.option(
        "--conv-rank",
        type=click.IntRange(min=1),
        help="The same for kernels over 1x1; --rank if left out.",
    ),
    click.option("--energy", type=float, help="Fewest directions with this share of Σσ²."),
    click.option("--error", type=float, help="Fewest with a relative error of at most this."),
    click.option("--sv-ratio", type=float, help="Directions with σ > σ₁ / this."),
    click.option("--sv-sum", type=float, help="Fewest directions with this share of Σσ."),
    click.option("--size", type=Size(), help="The whole file in this size, such as 72M."),
)
_COMMON = tuple(field.name for field in fields(Common) if field.default is MISSING)
_RULE = ("rank", "conv_rank", "energy", "error", "sv_ratio", "sv_sum", "size")


presets_file_option = click.option(
    "--presets-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The user's own block presets, the web UI's lbwpresets.txt.",
)
against_option = click.option(
    "--against",
    metavar="MODEL",
    shell_complete=complete_path,
    help="The model that DoRA, OFT, GLoRA and IA3 are taken on: their change depends on it.",
)
to_option = click.option(
    "--to",
    "dialect",
    type=click.Choice(("kohya", "peft", "diffusers", "comfyui")),
    help="The names to write.",
)


def writing_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of every writing command; the command gets them as `common`."""

    @wraps(command)
    def run(**kwargs: Any) -> None:
        chosen = {name: kwargs.pop(name) for name in _COMMON}
        chosen["dtype"] = DTYPES[chosen["dtype"]]
        keep_pages()
        command(common=Common(**chosen), **kwargs)

    return _decorated(guarded(run), _WRITING)


def rank_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the rank rules; the command gets them as `rule`."""

    @wraps(command)
    def run(**kwargs: Any) -> None:
        chosen = {name: kwargs.pop(name) for name in _RULE}
        command(rule=_rule(chosen), **kwargs)

    return _decorated(run, _RANKS)


def _rule(chosen: dict[str, Any]) -> "RankRule":
    from lorakit.linalg.ranks import RankRule

    return RankRule(**chosen)


def _decorated(
    command: Callable[..., None], options: tuple[Callable[[Any], Any], ...]
) -> Callable[..., None]:
    for option in reversed(options):
        command = option(command)
    return command


def refusing_others(
    name: str, *, beside: Sequence[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let an option that says all that shapes the output stand beside few others.

    Args:
        name: the option's parameter.
        beside: the parameters that go with it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**kwargs: Any) -> None:
            if kwargs[name] is not None:
                _refuse_others(click.get_current_context(), name, beside)
            command(**kwargs)

        return run

    return decorate


def _refuse_others(context: click.Context, name: str, beside: Sequence[str]) -> None:
    spelled = {
        str(parameter.name): max(parameter.opts, key=len)
        if isinstance(parameter, click.Option)
        else parameter.human_readable_name
        for parameter in context.command.params
    }
    given = [
        spelling
        for other, spelling in spelled.items()
        if other not in (name, *beside) and _was_given(context, other)
    ]
    if given:
        raise SpecError(
            f"{spelled[name]} repeats all that made the file; leave {', '.join(given)} out."
        )


def _was_given(context: click.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    # No argument at all counts as given.
    return source is not ParameterSource.DEFAULT and context.params.get(name) not in (None, ())


def one_of(**given: object) -> str:
    """Return the name of the one option that was given.

    Raises:
        SpecError: none was given, or several.
    """
    names = [name for name, value in given.items() if value]
    if len(names) != 1:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise SpecError(f"Give one of {options}; found {len(names)} of them.")
    return names[0]
