"""What the metadata of a LoRA says, in plain words."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

from lorakit.cli._letters import printable
from lorakit.cli._recipe_words import recipe_in_words
from lorakit.report import name_some
from lorakit.tensorfile.reading import parse_json

LONGEST = 300
"""Letters of a value that are shown."""
FIRST = {
    "ss_output_name": "name",
    "modelspec.title": "title",
    "ss_sd_model_name": "trained on",
    "ss_network_module": "network",
    "ss_network_dim": "network dim",
    "ss_network_alpha": "network alpha",
    "ss_learning_rate": "learning rate",
    "ss_optimizer": "optimizer",
    "ss_num_epochs": "epochs",
    "ss_steps": "steps",
    "ss_num_train_images": "images",
    "ss_resolution": "resolution",
    "ss_clip_skip": "clip skip",
    "ss_training_comment": "comment",
    "sshs_model_hash": "hash (AutoV3)",
}
"""What a summary tells of the training."""
LABELS = {
    **FIRST,
    "lorakit.recipe": "made by",
    "modelspec.sai_model_spec": "modelspec version",
    "ss_base_model_version": "base model",
    "ss_batch_size_per_device": "batch size",
    "ss_bucket_info": "sizes of the images",
    "ss_dataset_dirs": "folders of images",
    "ss_lr_scheduler": "learning rate schedule",
    "ss_max_train_steps": "steps at most",
    "ss_num_reg_images": "regularisation images",
    "ss_reg_dataset_dirs": "regularisation folders",
    "ss_sd_model_hash": "hash of what it was trained on (old)",
    "ss_new_sd_model_hash": "hash of what it was trained on",
    "ss_tag_frequency": "tags",
    "ss_text_encoder_lr": "learning rate of text encoders",
    "ss_unet_lr": "learning rate of the UNet",
    "ss_v2": "Stable Diffusion 2",
    "sshs_legacy_hash": "hash (old)",
}


def label(key: str) -> str:
    """Return what people call a metadata key; the key itself where it is no trainer's."""
    if key in LABELS:
        return LABELS[key]
    for prefix in ("ss_", "modelspec."):
        if key.startswith(prefix):
            return key.removeprefix(prefix).replace("_", " ")
    return key


def in_words(key: str, value: str) -> str:
    """Return a metadata value for people: dates, numbers of images, the most frequent tags."""
    try:
        text = _READERS.get(key, _any)(value)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, OSError):
        text = value
    return shortened(text or value)


def shortened(text: str) -> str:
    """Return a text for a table: printable, and not longer than a few lines."""
    told = printable(text[:LONGEST])
    return told if len(text) <= LONGEST else f"{told}… ({len(text):,} letters; --json shows all)"


def said(value: str | None) -> bool:
    """Tell whether a metadata value says anything: kohya writes None for what was not set."""
    return value not in (None, "", "None", "null", "{}", "[]")


def _any(value: str) -> str:
    if value in ("True", "False"):
        return "yes" if value == "True" else "no"
    if value[:1] == "(" and value[-1:] == ")":
        return " x ".join(part.strip() for part in value[1:-1].split(","))
    return _flat(parse_json(value)) if value[:1] in ("{", "[") else value


def _flat(found: Any) -> str:
    """Return JSON on one line, without the quotes and brackets of its first level."""
    if isinstance(found, Mapping):
        return ", ".join(f"{key}: {_inner(value)}" for key, value in found.items())
    return ", ".join(map(_inner, found)) if isinstance(found, list) else _inner(found)


def _inner(value: Any) -> str:
    plain = isinstance(value, str | float | int) or value is None
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


def _moment(value: str) -> str:
    return datetime.fromtimestamp(float(value), tz=timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _folders(value: str) -> str:
    return ", ".join(
        _times(name, found["img_count"], found.get("n_repeats", 1))
        for name, found in parse_json(value).items()
    )


def _times(name: str, images: int, repeats: int) -> str:
    return f"{name}: {images} images" + (f" x {repeats}" if repeats != 1 else "")


def _tags(value: str) -> str:
    counts: Counter[str] = Counter()
    for tags in parse_json(value).values():
        counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return name_some((f"{tag} ({count})" for tag, count in ranked), limit=12)


def _buckets(value: str) -> str:
    buckets = parse_json(value)["buckets"].values()
    return ", ".join(
        f"{bucket['resolution'][0]} x {bucket['resolution'][1]}: {bucket['count']}"
        for bucket in buckets
    )


def _datasets(value: str) -> str:
    return "; ".join(map(_dataset, parse_json(value)))


def _dataset(found: Mapping[str, Any]) -> str:
    sides = found.get("resolution") or ()
    parts = [
        f"{found['num_train_images']} images",
        f"at {' x '.join(map(str, sides))}" if sides else "",
        f"batch {found['batch_size_per_device']}" if "batch_size_per_device" in found else "",
        *(
            _times(str(s.get("image_dir") or "a folder"), s["img_count"], s.get("num_repeats", 1))
            for s in found.get("subsets", ())
        ),
    ]
    return ", ".join(part for part in parts if part)


def _picture(value: str) -> str:
    return f"a picture of {len(value) * 3 // 4096:,} KiB" if value.startswith("data:") else value


_READERS: Mapping[str, Callable[[str], str]] = {
    "lorakit.recipe": recipe_in_words,
    "modelspec.thumbnail": _picture,
    "ss_bucket_info": _buckets,
    "ss_dataset_dirs": _folders,
    "ss_datasets": _datasets,
    "ss_reg_dataset_dirs": _folders,
    "ss_tag_frequency": _tags,
    "ss_training_finished_at": _moment,
    "ss_training_started_at": _moment,
}
