"""The options of merge methods, read into one `Method`."""

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

import click

from lorakit.methods.menu import FLAVORS, MENU, SPACES
from lorakit.methods.method import CHOICES, LINEAR, Method

_OPTIONS: tuple[Callable[[Callable[..., None]], Callable[..., None]], ...] = (
    click.option(
        "--method",
        type=click.Choice(tuple(MENU)),
        default="linear",
        show_default=True,
        help="How the LoRAs are combined: linear is Σ strength · ΔW, exactly. See lorakit methods.",
    ),
    click.option(
        "--space",
        type=click.Choice(SPACES),
        help="Where an elementwise method acts; core for a LoRA, full into a checkpoint.",
    ),
    click.option("--density", type=float, help="The share of the elements that is kept."),
    click.option(
        "--lambda",
        "lambda_",
        type=float,
        default=1.0,
        show_default=True,
        help="Multiplies the result.",
    ),
    click.option("--epsilon", type=float, help="della: the spread of the chances around density."),
    click.option("--gamma", type=float, help="breadcrumbs: the share of outliers left out."),
    click.option("--seed", type=click.IntRange(min=0), help="Of the random masks."),
    click.option(
        "--votes",
        type=click.Choice(CHOICES["votes"]),
        help="A sign is elected by mass or by the number of LoRAs; mass if left out.",
    ),
    click.option(
        "--scope",
        type=click.Choice(CHOICES["scope"]),
        help="What the largest elements are chosen from; the tensor if left out.",
    ),
    click.option("--normalize", is_flag=True, help="Divide by the sum of the strengths' sizes."),
    click.option(
        "--flavor",
        type=click.Choice(FLAVORS),
        default="lorakit",
        show_default=True,
        help="Whose conventions, where they differ.",
    ),
    click.option(
        "--match-norm",
        type=click.Choice(CHOICES["match_norm"]),
        help="Give the result the mean norm of the inputs, or that of their plain sum.",
    ),
    click.option(
        "--calibrate",
        type=click.Choice(CHOICES["calibrate"]),
        default="none",
        show_default=True,
        help="pico weakens the directions that the LoRAs share before they are merged.",
    ),
)
_TAKEN = tuple(field.name for field in fields(Method) if field.name != "name")


def method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of merge methods; the command gets them as `method`."""

    @wraps(command)
    def run(**kwargs: Any) -> None:
        chosen = {name: kwargs.pop(name) for name in _TAKEN}
        command(method=Method(name=kwargs.pop("method"), **chosen), **kwargs)

    decorated: Callable[..., None] = run
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def method_parameters(method: Method) -> dict[str, Any]:
    """Return a method as a recipe holds it: its name, and what is not as it is for every method."""
    chosen = {"method": method.name}
    for name in _TAKEN:
        value = getattr(method, name)
        # Calibrated merges match the mean norm unless they are told not to.
        told = value != "none" or (name == "match_norm" and method.calibrate != "none")
        if value != getattr(LINEAR, name) and told:
            chosen[name] = value
    return chosen
