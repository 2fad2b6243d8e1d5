"""How a file was made: its recipe in words, read from the header alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.tensorfile.reading import parse_json


def recipe_in_words(text: str) -> str:
    """Return what made a file: 'lorakit 1.0, merge of a at 0.8 and b at 0.5; rank 16'.

    Args:
        text: the recipe as it is stored.

    Raises:
        ValueError: it is no JSON.
        TypeError: it is no recipe.
        LookupError: something of it is missing.
    """
    recipe = parse_json(text)
    options = dict(recipe.get("options", {}))
    command = str(recipe["command"])
    done = _done(command, recipe["inputs"], options)
    if options.get("method") == "linear":
        del options["method"]
    rest = [_option(name, value) for name, value in sorted(options.items())]
    made = f"lorakit {recipe['lorakit']}, {command} of {done}"
    return "; ".join([made, ", ".join(rest)] if rest else [made])


def _done(command: str, inputs: Sequence[Any], options: dict[str, Any]) -> str:
    """Say what was done with which files, and take those that options name out of these."""
    into, against = options.pop("into", None), options.pop("against", None)
    if command == "extract":
        before, after = inputs
        done = f"what turns {_side(before)} into {_side(after)}"
    else:
        done = listed([_lora(record) for record in inputs])
    if into is not None:
        done += f", baked into {_side(into)}"
    return done if against is None else f"{done}, taken on {_side(against)}"


def _side(record: Any) -> str:
    """Name a model with the LoRAs on it, or LoRAs alone; older recipes have the text itself."""
    if not isinstance(record, Mapping):
        return str(record)
    loras = [_lora(one) for one in record.get("loras", ())]
    if "model" not in record:
        return listed(loras) or "nothing"
    return f"{record['model']} with {listed(loras)}" if loras else str(record["model"])


def _lora(record: Any) -> str:
    if not isinstance(record, Mapping):
        return str(record)
    strength = str(record.get("strength", "1"))
    return str(record["lora"]) + ("" if strength == "1" else f" at {strength}")


def listed(names: Sequence[str]) -> str:
    """Write names as a sentence has them: 'a, b and c'."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _option(name: str, value: Any) -> str:
    plain = name.rstrip("_").replace("_", "-")
    if value is True:
        return plain
    if isinstance(value, Mapping):
        return f"{plain} {', '.join(map(str, value))}"
    return f"{plain} {' '.join(map(str, value)) if isinstance(value, list) else value}"
