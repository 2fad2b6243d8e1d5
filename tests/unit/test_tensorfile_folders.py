"""Shards and diffusers folders: read as one model, and written in the form that they came in."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import FileFormatError, NumericsError, OutputError
from lorakit.tensorfile.header import Spec
from lorakit.tensorfile.source import DictSource, MultiFileSource, open_source
from lorakit.tensorfile.writer import write_folder, write_model

PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def make_shards(folder: Path, stem: str = "model", variant: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{stem}-0000{i}-of-00002{variant}.safetensors" for i in (1, 2)]
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, folder / names[0], {"format": "pt"})
    save_file({"c": torch.zeros(5).half()}, folder / names[1], {"format": "pt", "part": "2"})
    weight_map = {"a": names[0], "b": names[0], "c": names[1]}
    table = {"metadata": {"total_size": 50}, "weight_map": weight_map}
    index = folder / f"{stem}.safetensors.index{variant}.json"
    index.write_text(json.dumps(table))
    return index


@pytest.fixture
def pipeline(tmp_path) -> Path:
    root = tmp_path / "pipe"
    make_shards(root / "transformer", "diffusion_pytorch_model")
    for name, stem in {"vae": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        (root / name).mkdir()
        save_file({"w": torch.full((3,), 2.0)}, root / name / f"{stem}.safetensors")
        save_file({"w": torch.ones(3).half()}, root / name / f"{stem}.fp16.safetensors")
        torch.save({"w": torch.ones(3)}, root / name / f"{stem}.bin")
        (root / name / "config.json").write_text("{}")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.json").write_text('{"ü": 1}', encoding="utf-8")
    (root / ".cache").mkdir()
    (root / ".cache" / "lock").write_text("")
    (root / "model_index.json").write_text("{}")
    return root


class Plus:
    """A source derived from another, one added to some keys; perhaps stored in another dtype."""

    def __init__(self, base, touched=(), dtype=None, metadata=None):
        self.base, self.touched, self.name = base, touched, base.name
        self.metadata = dict(base.metadata) if metadata is None else metadata
        self.specs = {k: Spec(dtype or s.dtype, s.shape) for k, s in base.specs.items()}

    def get(self, key):
        tensor = self.base.get(key)
        return tensor.float() + 1 if key in self.touched else tensor

    def extent(self, key):
        kept = key not in self.touched and self.specs[key] == self.base.specs[key]
        return self.base.extent(key) if kept else None


@pytest.mark.parametrize("way", ["index", "folder", "first part", "second part"])
def test_shards_are_one_model_whatever_path_leads_to_them(tmp_path, way):
    index = make_shards(tmp_path / "m")
    path = {"index": index, "folder": index.parent}.get(way, index.parent / PARTS["se" in way[:2]])
    source = open_source(path)
    assert isinstance(source, MultiFileSource)
    assert list(source.specs) == ["a", "b", "c"]
    assert source.get("c").dtype == torch.float16
    assert source.metadata == {"format": "pt"}
    extent = source.extent("c")
    assert extent is not None and extent.path.name == PARTS[1]
    assert source.files == {PARTS[0]: {"a": "a", "b": "b"}, PARTS[1]: {"c": "c"}}


def test_a_pipeline_is_one_model_with_its_components_before_the_keys(pipeline):
    source = open_source(pipeline)
    assert set(source.specs) == {f"transformer/{k}" for k in "abc"} | {"vae/w", "text_encoder/w"}
    assert source.specs["vae/w"] == Spec("F32", (3,)), "the variant without a name is taken"
    assert float(source.get("text_encoder/w").sum()) == 6.0
    assert isinstance(source, MultiFileSource) and source.root == pipeline


def test_one_named_variant_is_taken_and_several_are_refused(tmp_path):
    make_shards(tmp_path / "m", variant=".fp16")
    assert list(open_source(tmp_path / "m").specs) == ["a", "b", "c"]
    save_file({"a": torch.ones(1)}, tmp_path / "m" / "model.bf16.safetensors")
    with pytest.raises(FileFormatError, match=r"one variant .* bf16, fp16"):
        open_source(tmp_path / "m")


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path):
    make_shards(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileFormatError, match="one set of weights"):
        open_source(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(FileFormatError, match="found nothing"):
        open_source(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "style.safetensors")
    with pytest.raises(FileFormatError, match=r"name the file itself: style\.safetensors"):
        open_source(tmp_path)


def test_a_part_without_its_index_is_refused(tmp_path):
    make_shards(tmp_path).unlink()
    with pytest.raises(FileFormatError, match="expected an index"):
        open_source(tmp_path / PARTS[0])


DAMAGED_INDEXES = {
    "a missing file": ({"a": PARTS[0], "b": PARTS[0], "c": "model-9.safetensors"}, "nothing there"),
    "a missing tensor": (
        {"a": PARTS[0], "b": PARTS[0], "c": PARTS[1], "d": PARTS[1]},
        "expected d",
    ),
    "a tensor elsewhere": ({"a": PARTS[0], "b": PARTS[1], "c": PARTS[1]}, "expected b"),
    "an unnamed tensor": ({"a": PARTS[0], "c": PARTS[1]}, "expected b in none"),
    "a way out": ({"a": "../x.safetensors"}, "a file beside it"),
    "an absolute path": ({"a": "/x.safetensors"}, "a file beside it"),
    "a drive": ({"a": "C:x.safetensors"}, "a file beside it"),
    "a number": ({"a": 3}, "a file beside it"),
    "nothing": ({}, "weight_map"),
}


@pytest.mark.parametrize("case", DAMAGED_INDEXES, ids=lambda case: case.replace(" ", "-"))
def test_an_index_that_does_not_fit_is_refused(tmp_path, case):
    weight_map, reason = DAMAGED_INDEXES[case]
    index = make_shards(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileFormatError, match=reason):
        open_source(index)


def content(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_a_folder_is_written_file_by_file_with_what_belongs_to_it(tmp_path, pipeline):
    out = tmp_path / "out"
    written = write_model(out, Plus(open_source(pipeline), {"transformer/c"}))
    old, new = content(pipeline), content(out)
    dropped = {name for name in old if ".fp16." in name or name.endswith((".bin", "lock"))}
    assert set(new) == set(old) - dropped and dropped
    assert written.path == out and written.nbytes == sum(map(len, new.values()))
    changed = {name for name in new if new[name] != old[name]}
    assert changed == {"transformer/diffusion_pytorch_model-00002-of-00002.safetensors"}
    assert float(load_file(out / changed.pop())["c"].sum()) == 5.0
    assert open_source(out).specs == open_source(pipeline).specs
    assert not [entry for entry in tmp_path.iterdir() if entry.name.endswith(".tmp")]


def test_the_metadata_of_each_file_stays_and_what_is_new_comes_to_all(tmp_path):
    source = open_source(make_shards(tmp_path / "m"))
    write_model(tmp_path / "out", Plus(source, metadata={"format": "pt", "recipe": "r"}))
    parts = [open_source(tmp_path / "out").parts[name].metadata for name in PARTS]
    assert parts == [
        {"format": "pt", "recipe": "r"},
        {"format": "pt", "part": "2", "recipe": "r"},
    ]
    write_model(tmp_path / "bare", Plus(source, metadata={}))
    bare = [open_source(tmp_path / "bare").parts[name].metadata for name in PARTS]
    assert bare == [{}, {"part": "2"}]


def test_another_dtype_changes_the_total_size_of_the_index(tmp_path):
    source = open_source(make_shards(tmp_path / "m"))
    write_model(tmp_path / "out", Plus(source, dtype="F16"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 30
    assert set(open_source(tmp_path / "out").specs.values()) >= {Spec("F16", (4,))}


def test_shards_may_become_one_file_and_components_may_not(tmp_path, pipeline):
    source = open_source(make_shards(tmp_path / "m"))
    write_model(tmp_path / "one.safetensors", source)
    assert list(open_source(tmp_path / "one.safetensors").specs) == ["a", "b", "c"]
    with pytest.raises(OutputError, match=r"leave \.safetensors out"):
        write_model(tmp_path / "two.safetensors", open_source(pipeline))


def test_a_file_is_written_as_a_file(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    write_model(tmp_path / "b.safetensors", open_source(tmp_path / "a.safetensors"))
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_an_existing_folder_is_replaced_only_when_asked_and_only_what_is_written(tmp_path):
    source = open_source(make_shards(tmp_path / "m"))
    out = tmp_path / "out"
    out.mkdir()
    write_model(out, source)
    with pytest.raises(OutputError, match="--overwrite"):
        write_model(out, source)
    write_model(out, Plus(source, {"b"}), overwrite=True)
    assert float(open_source(out).get("b").sum()) == 8.0
    (out / "diary.txt").write_text("mine")
    before = content(out)
    with pytest.raises(OutputError, match=r"diary\.txt"):
        write_model(out, source, overwrite=True)
    assert content(out) == before


def test_the_input_folder_and_its_files_are_never_replaced(tmp_path):
    index = make_shards(tmp_path / "m")
    source = open_source(index)
    before = content(index.parent)
    for out in (
        index.parent,
        index.parent / "below",
        index.parent / PARTS[0],
        index.parent / "model.safetensors" / ".." / PARTS[1],
    ):
        with pytest.raises(OutputError):
            write_model(out, source, overwrite=True)
    assert content(index.parent) == before


@pytest.mark.parametrize("there", [True, False], ids=["overwriting", "new"])
def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path, there):
    source = open_source(make_shards(tmp_path / "m"))
    out = tmp_path / "outputs" / "out"
    if there:
        write_model(out, source)
    before = content(tmp_path)
    broken = Plus(source, {"c"})
    broken.get = lambda key: torch.full((5,), float("nan"))
    with pytest.raises(NumericsError, match=r"model-00002-of-00002\.safetensors: c: "):
        write_model(out, broken, overwrite=True)
    assert content(tmp_path) == before and out.exists() == there


def test_a_folder_of_parts_and_texts_is_written(tmp_path):
    parts = {
        "unet/x.safetensors": DictSource({"a": torch.ones(2)}),
        "y.safetensors": DictSource({}),
    }
    told: list[tuple[int, int]] = []
    written = write_folder(
        tmp_path / "out",
        parts,
        texts={"unet/config.json": '{"ü": 1}\n'},
        progress=lambda what, done, total: told.append((done, total)),
    )
    new = content(tmp_path / "out")
    assert set(new) == {"unet/x.safetensors", "unet/config.json", "y.safetensors"}
    assert new["unet/config.json"].decode() == '{"ü": 1}\n'
    weights = len(new["unet/x.safetensors"]) + len(new["y.safetensors"])
    assert written.nbytes == sum(map(len, new.values()))
    assert told[-1] == (weights, weights)


@pytest.mark.skipif(os.name != "posix", reason="links need a right on Windows")
class TestLinks:
    """What is copied along is the model's own: no link brings in what lies elsewhere."""

    def test_a_link_that_leads_out_is_refused(self, tmp_path):
        source = open_source(make_shards(tmp_path / "m"))
        (tmp_path / "secret.json").write_text("mine")
        for kind in ("file", "folder"):
            link = tmp_path / "m" / "link.json"
            link.symlink_to(tmp_path / "secret.json" if kind == "file" else tmp_path)
            with pytest.raises(FileFormatError, match=r"link\.json: .* leads to"):
                write_model(tmp_path / "out", source)
            link.unlink()
        assert not (tmp_path / "out").exists()
        write_model(tmp_path / "out", source)

    def test_a_circle_is_refused(self, tmp_path):
        source = open_source(make_shards(tmp_path / "m"))
        (tmp_path / "m" / "a").mkdir()
        for target in ("..", ".", "../a"):
            link = tmp_path / "m" / "a" / "link"
            link.symlink_to(target)
            with pytest.raises(FileFormatError, match=r"link: .* leads to"):
                write_model(tmp_path / "out", source)
            link.unlink()

    def test_links_inside_are_copies(self, tmp_path):
        source = open_source(make_shards(tmp_path / "m"))
        (tmp_path / "m" / "tokenizer").mkdir()
        (tmp_path / "m" / "tokenizer" / "vocab.json").write_text("{}")
        (tmp_path / "m" / "tokenizer_2").symlink_to("tokenizer")
        (tmp_path / "m" / "card.md").symlink_to("tokenizer/vocab.json")
        write_model(tmp_path / "out", source)
        for name in ("tokenizer/vocab.json", "tokenizer_2/vocab.json", "card.md"):
            assert (tmp_path / "out" / name).read_text() == "{}"
            assert not (tmp_path / "out" / name).is_symlink()

    def test_the_cache_of_hugging_face_is_all_links(self, tmp_path):
        plain = make_shards(tmp_path / "plain").parent
        (plain / "config.json").write_text("{}")
        blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for number, file in enumerate(sorted(plain.iterdir())):
            file.rename(blobs / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
        write_model(tmp_path / "out", open_source(snapshot))
        assert (tmp_path / "out" / "config.json").read_text() == "{}"
