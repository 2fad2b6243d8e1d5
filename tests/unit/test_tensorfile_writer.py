"""The writer: safetensors' own bytes, whole or not at all, within its memory."""

import errno
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorakit.compute import Compute
from lorakit.errors import FileFormatError, NumericsError, OutputError
from lorakit.tensorfile import copying, extents, replacing
from lorakit.tensorfile.header import DTYPE_BITS, Extent, save_order
from lorakit.tensorfile.source import DictSource, FileSource, open_source, torch_dtype
from lorakit.tensorfile.writer import Written, write_safetensors

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


class Computed:
    """A source derived from a file, where `touched` keys are computed by `function`."""

    def __init__(self, base, touched, function=lambda key, tensor: tensor.float() + 1):
        self.base, self.touched, self.function = base, set(touched), function
        self.name, self.specs, self.metadata = base.name, base.specs, base.metadata

    def get(self, key):
        tensor = self.base.get(key)
        return self.function(key, tensor) if key in self.touched else tensor

    def extent(self, key):
        return None if key in self.touched else self.base.extent(key)


@pytest.fixture
def base(tmp_path) -> FileSource:
    path = tmp_path / "base.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors = {f"l{i:02}.w": torch.randn(64, 32, generator=generator).half() for i in range(20)}
    save_file(tensors | {"ids": torch.arange(7)}, path, metadata={"format": "pt"})
    source = open_source(path)
    assert isinstance(source, FileSource)
    return source


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.endswith(".tmp")]


def every_dtype() -> dict[str, torch.Tensor]:
    tensors = {}
    for name in DTYPE_BITS:
        if name.startswith("F6"):
            continue
        dtype = torch_dtype(name)
        raw = torch.arange(15 * dtype.itemsize, dtype=torch.uint8)
        if name == "BOOL":
            raw %= 2
        tensors[f"x.{name}"] = raw.view(dtype).reshape(3, 5).clone()
        tensors[f"empty.{name}"] = tensors[f"x.{name}"][:0].clone()
        if name != "F4":
            tensors[f"scalar.{name}"] = tensors[f"x.{name}"][1, 2].clone()
    return tensors


@pytest.mark.parametrize("metadata", [{}, {'ü"\\\x01\n\x7f\u2028/😀': 'ü"\\\x01\n\x7f\u2028/😀'}])
def test_the_bytes_are_those_of_safetensors_for_every_dtype(tmp_path, metadata):
    tensors = every_dtype()
    theirs = tmp_path / "theirs.safetensors"
    save_file(tensors, theirs, metadata=metadata or None)
    specs = DictSource(tensors).specs
    ours = DictSource({key: tensors[key] for key in save_order(specs)}, metadata)
    for name, source in {"ours": ours, "copied": open_source(theirs)}.items():
        written = write_safetensors(tmp_path / name, source)
        assert (tmp_path / name).read_bytes() == theirs.read_bytes()
        assert written == Written(path=tmp_path / name, nbytes=theirs.stat().st_size)


def test_metadata_is_sorted_and_read_by_safetensors(tmp_path):
    # safetensors' own order of it changes from run to run, so it is no model.
    metadata = {"z": "1", "a": "2", "": "3", "é": "4", "B": "5"}
    write_safetensors(tmp_path / "out", DictSource({"x": torch.ones(1)}, metadata))
    with safe_open(tmp_path / "out", framework="pt") as file:
        assert file.metadata() == metadata
    places = [(tmp_path / "out").read_bytes().index(f'"{v}"'.encode()) for v in "35214"]
    assert places == sorted(places)


def test_a_file_without_tensors_is_written(tmp_path):
    save_file({}, tmp_path / "theirs")
    write_safetensors(tmp_path / "ours", DictSource({}))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_order_of_the_source_is_kept(tmp_path):
    source = DictSource({"z": torch.ones(2), "a": torch.ones(3), "m": torch.ones(1)})
    write_safetensors(tmp_path / "x", source)
    assert list(open_source(tmp_path / "x").specs) == ["z", "a", "m"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("memory", [1, 10**9])
def test_computed_tensors_come_between_copied_ones_in_their_places(tmp_path, base, threads, memory):
    touched = [key for key in base.specs if key[-3:] in {"0.w", "1.w", "7.w"}]

    def slow(key, tensor):
        time.sleep(0.01 if key == touched[0] else 0.0)
        return tensor.float() + 1

    source = Computed(base, touched, slow)
    compute = Compute(threads=threads, memory=memory)
    write_safetensors(tmp_path / "out.safetensors", source, compute=compute)
    out = load_file(tmp_path / "out.safetensors")
    old = load_file(base.path)
    assert list(open_source(tmp_path / "out.safetensors").specs) == list(base.specs)
    for key in old:
        expected = (old[key].float() + 1).half() if key in touched else old[key]
        assert torch.equal(out[key], expected)
    assert touched and not torch.equal(out[touched[0]], old[touched[0]])


def test_neighbouring_bytes_are_one_copy(tmp_path, base, monkeypatch):
    extents: list[Extent] = []
    copy = copying.copy_extent
    monkeypatch.setattr(
        "lorakit.tensorfile.sinks.copy_extent",
        lambda extent, file: extents.append(extent) or copy(extent, file),
    )
    write_safetensors(tmp_path / "out", Computed(base, ["l05.w"]))
    assert len(extents) == 2
    assert sum(extent.length for extent in extents) == 7 * 8 + 19 * 64 * 32 * 2


class TestKernelCopies:
    """Wherever the kernel's copy gives up, plain reading and writing goes on."""

    @pytest.fixture(params=["absent", "refuses", "stops", "breaks midway"])
    def kernel(self, request, monkeypatch):
        calls = [0]

        def fake(source, target, count, position):
            calls[0] += 1
            if request.param == "refuses":
                raise OSError(errno.EXDEV, "cross-device")
            if request.param == "stops" and calls[0] == 2:
                return 0
            if request.param == "breaks midway" and calls[0] == 3:
                raise OSError(errno.EINVAL, "invalid")
            os.lseek(source, position, os.SEEK_SET)
            return os.write(target, os.read(source, min(count, 1000)))

        if request.param == "absent":
            monkeypatch.delattr(os, "copy_file_range", raising=False)
        else:
            monkeypatch.setattr(os, "copy_file_range", fake, raising=False)
        return calls

    def test_the_bytes_are_the_same(self, tmp_path, base, kernel, monkeypatch):
        monkeypatch.setattr(copying, "_BUFFER", 777)
        write_safetensors(tmp_path / "out", base)
        assert (tmp_path / "out").read_bytes() == base.path.read_bytes()

    def test_an_input_that_is_cut_off_while_it_is_read_is_named(
        self, tmp_path, base, kernel, monkeypatch
    ):
        # As it was when it was opened.
        monkeypatch.setattr(extents, "stamp_of", lambda file: base.header.stamp)
        with open(base.path, "r+b") as file:
            file.truncate(base.header.size - 5)
        with pytest.raises(FileFormatError, match=r"base\.safetensors: expected .* end of the"):
            write_safetensors(tmp_path / "out", base)
        assert [entry.name for entry in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("grown", [-5, 5])
def test_an_input_of_another_size_than_its_header_had_is_named(tmp_path, base, grown):
    with open(base.path, "r+b") as file:
        file.truncate(base.header.size + grown)
    with pytest.raises(FileFormatError, match=r"base\.safetensors: expected the file as it was"):
        write_safetensors(tmp_path / "out", base)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, NumericsError, MemoryError])
@pytest.mark.parametrize("there", [True, False], ids=["overwriting", "new"])
def test_any_failure_leaves_the_old_file_and_nothing_else(tmp_path, base, error, there):
    out = tmp_path / "out" / "model.safetensors"
    out.parent.mkdir()
    if there:
        out.write_bytes(b"old")

    def fail(key, tensor):
        if key == "l12.w":
            raise error("midway")
        return tensor

    with pytest.raises(error):
        write_safetensors(out, Computed(base, base.specs, fail), overwrite=True)
    assert [entry.name for entry in out.parent.iterdir()] == (
        ["model.safetensors"] if there else []
    )
    assert not there or out.read_bytes() == b"old"


def test_an_interruption_of_the_writing_thread_leaves_nothing(tmp_path, base):
    def interrupt(what, done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "out", Computed(base, ["l03.w", "l12.w"]), progress=interrupt)
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


@posix
def test_a_limit_of_the_file_size_is_a_plain_sentence_and_leaves_nothing(tmp_path, base):
    out = tmp_path / "limited" / "out.safetensors"
    out.parent.mkdir()
    out.write_bytes(b"old")
    code = f"""
        import resource
        from lorakit.errors import OutputError
        from lorakit.tensorfile.source import open_source
        from lorakit.tensorfile.writer import write_safetensors
        source = open_source({str(base.path)!r})
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            write_safetensors({str(out)!r}, source, overwrite=True)
        except OutputError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "File too large" in done.stdout and "ulimit" in done.stdout
    assert [entry.name for entry in out.parent.iterdir()] == ["out.safetensors"]
    assert out.read_bytes() == b"old"


@posix
def test_the_mode_is_the_umasks_or_the_old_files(tmp_path, base):
    before = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "new", base)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_safetensors(tmp_path / "new", base, overwrite=True)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


@posix
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path, base):
    real = tmp_path / "disk" / "real.safetensors"
    real.parent.mkdir()
    real.write_bytes(b"old")
    link = tmp_path / "link.safetensors"
    link.symlink_to(real)
    write_safetensors(link, base, overwrite=True)
    assert link.is_symlink() and real.read_bytes() == base.path.read_bytes()


def test_the_file_is_synced_before_it_takes_its_place(tmp_path, base, monkeypatch):
    events: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or sync(fd))
    monkeypatch.setattr(Path, "replace", lambda a, b: events.append("replace") or replace(a, b))
    write_safetensors(tmp_path / "out", base)
    assert events[:2] == ["sync", "replace"]


def test_an_existing_file_is_refused_without_overwrite(tmp_path, base):
    out = tmp_path / "out"
    out.write_bytes(b"old")
    with pytest.raises(OutputError, match="--overwrite"):
        write_safetensors(out, base)
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize("kind", ["itself", "hard link", "symbolic link", "dotted path", "folder"])
def test_an_input_is_never_replaced(tmp_path, base, kind):
    out = {"itself": base.path, "folder": base.path}.get(kind, tmp_path / "other.safetensors")
    if kind == "hard link":
        out.hardlink_to(base.path)
    elif kind == "symbolic link":
        if os.name != "posix":
            pytest.skip("needs a right on Windows")
        out.symlink_to(base.path)
    elif kind == "dotted path":
        (tmp_path / "sub").mkdir()
        out = tmp_path / "sub" / ".." / base.path.name
    inputs = [tmp_path if kind == "folder" else base.path]
    with pytest.raises(OutputError, match="inputs are never replaced"):
        write_safetensors(out, base, overwrite=True, inputs=inputs)
    assert open_source(base.path).specs == base.specs


def test_a_file_may_be_rewritten_from_itself(tmp_path, base):
    content = base.path.read_bytes()
    write_safetensors(base.path, base, overwrite=True)
    assert base.path.read_bytes() == content


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth", "bin", "CKPT"])
def test_only_safetensors_are_written(tmp_path, base, ending):
    with pytest.raises(OutputError, match="safetensors only"):
        write_safetensors(tmp_path / f"out.{ending}", base)


def test_a_folder_and_a_file_as_parent_are_refused(tmp_path, base):
    with pytest.raises(OutputError, match="found a folder"):
        write_safetensors(tmp_path, base, overwrite=True)
    with pytest.raises(OutputError, match="a part of the path is a file"):
        write_safetensors(base.path / "below" / "out.safetensors", base)


def test_folders_are_made(tmp_path, base):
    write_safetensors(tmp_path / "a" / "b" / "out.safetensors", base)
    assert open_source(tmp_path / "a" / "b" / "out.safetensors").specs == base.specs


def test_a_name_of_the_greatest_length_works(tmp_path, base):
    out = tmp_path / ("n" * 243 + ".safetensors")
    write_safetensors(out, base)
    assert out.stat().st_size == base.header.size


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, base, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=base.header.size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match=f"expected {base.header.size:,} free bytes"):
        write_safetensors(tmp_path / "new" / "out", base)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT if hasattr(errno, "EDQUOT") else errno.ENOSPC, "free some space"),
        (errno.EROFS, "can be written to"),
        (errno.EACCES, "may write to"),
        (errno.EIO, "try another folder"),
    ],
)
def test_a_failing_disk_is_a_plain_sentence(tmp_path, base, monkeypatch, code, hint):
    def fail(file, data):
        raise OSError(code, "The reason")

    monkeypatch.setattr("lorakit.tensorfile.sinks.write_all", fail)
    with pytest.raises(OutputError, match=f"out: expected to write .*'The reason'; .*{hint}"):
        write_safetensors(tmp_path / "out", base)
    assert not leftovers(tmp_path)


def test_a_folder_that_cannot_be_synced_does_no_harm(tmp_path, base, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "a folder")

    monkeypatch.setattr(replacing.os, "open", refuse)
    write_safetensors(tmp_path / "out", base)
    assert (tmp_path / "out").read_bytes() == base.path.read_bytes()


def test_the_workers_run_ahead_only_as_far_as_the_memory_allows(tmp_path, base):
    # The first thing told is the header.
    started, written, ahead = [0], [-1], [0]

    def count(key, tensor):
        started[0] += 1
        ahead[0] = max(ahead[0], started[0] - written[0])
        return tensor.float()

    def tell(what, done, total):
        written[0] += 1

    keys = [key for key in base.specs if key != "ids"]
    cost = 16 * base.specs[keys[0]].numel
    source = Computed(DictSource({key: base.get(key) for key in keys}), keys, count)
    compute = Compute(threads=2, memory=4 * cost)
    write_safetensors(tmp_path / "out", source, compute=compute, progress=tell)
    assert started[0] == written[0] == len(keys)
    # Four in flight, one in the writer's hands and one drawn while that one is written.
    assert 2 <= ahead[0] <= 6


def test_progress_ends_at_the_size_of_the_file(tmp_path, base):
    told: list[tuple[str, int, int]] = []
    source = Computed(base, ["l03.w"])
    written = write_safetensors(tmp_path / "out", source, progress=lambda *a: told.append(a))
    dones = [done for _, done, _ in told]
    assert dones == sorted(dones) and dones[-1] == written.nbytes
    assert {total for _, _, total in told} == {written.nbytes}


def test_overflow_is_refused_by_file_and_layer(tmp_path, base):
    source = Computed(base, ["l03.w"], lambda key, tensor: tensor.float() * 1e6)
    with pytest.raises(NumericsError, match=r"base\.safetensors: l03\.w: .* overflows F16"):
        write_safetensors(tmp_path / "out", source)
    assert [entry.name for entry in tmp_path.iterdir()] == ["base.safetensors"]
