"""Pickled checkpoints: tensors are read, code is named and never run."""

import contextlib
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit.errors import FileFormatError
from lorakit.tensorfile.header import Spec
from lorakit.tensorfile.source import PickleSource, open_source
from tests.fuzz.pickled import GADGETS, LEGACY, calls, rebuilt, state, zipped
from tests.fuzz.watch import watching

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).half()}


def check(source) -> None:
    assert isinstance(source, PickleSource)
    assert source.specs == {"a.weight": Spec("F32", (2, 3)), "b": Spec("F16", (4,))}
    assert torch.equal(source.get("a.weight"), TENSORS["a.weight"])
    assert source.extent("b") is None


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "module", "model", "anything"])
def test_a_checkpoint_is_read_whatever_wraps_it(tmp_path, zipped, wrapper):
    path = tmp_path / "m.ckpt"
    content = TENSORS if wrapper is None else {wrapper: TENSORS, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    check(open_source(path))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_checkpoint_is_read_whatever_it_is_called(tmp_path, zipped):
    """torch goes by the name where it ends in .safetensors."""
    path = tmp_path / "m.safetensors"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    check(open_source(path))
    path.write_bytes(b"\x80\x02}q\0.")
    with pytest.raises(FileFormatError, match=r"m\.safetensors: expected"):
        open_source(path)


def test_a_wrapper_wins_over_tensors_beside_it(tmp_path):
    path = tmp_path / "m.ckpt"
    torch.save({"global_step": torch.tensor(7), "state_dict": {"module": TENSORS}}, path)
    check(open_source(path))


def test_shared_and_transposed_storages_are_read_as_copies(tmp_path):
    path = tmp_path / "m.pt"
    base = torch.arange(12.0).reshape(3, 4)
    torch.save({"x": base, "same": base, "t": base.T, "row": base[1]}, path)
    source = open_source(path)
    source.get("x").zero_()
    assert torch.equal(source.get("same"), base)
    assert torch.equal(source.get("t"), base.T) and source.get("t").is_contiguous()
    assert torch.equal(source.get("row"), base[1])


def test_parameters_are_tensors_and_what_is_none_is_listed(tmp_path):
    path = tmp_path / "m.bin"
    entries = OrderedDict(w=torch.nn.Parameter(torch.ones(2)), version="1", step=3)
    torch.save(entries, path)
    source = open_source(path)
    assert isinstance(source, PickleSource)
    assert list(source.specs) == ["w"] and source.skipped == ("version", "step")
    assert not source.get("w").requires_grad


def test_the_bookkeeping_of_trainers_is_read_past(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = callback
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    monkeypatch.setitem(
        sys.modules, "pytorch_lightning.callbacks", types.ModuleType("pytorch_lightning.callbacks")
    )
    monkeypatch.setitem(sys.modules, name, module)
    path = tmp_path / "m.ckpt"
    made = callback()
    made.best = 0.5
    content = {
        "state_dict": TENSORS,
        "callbacks": {callback: {"best_model_score": np.float64(0.5)}},
        "made": made,
        "scale": np.float32(2),
    }
    torch.save(content, path)
    check(open_source(path))


class Evil:
    """A pickle of it creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


class Shell(Evil):
    """A pickle of it runs a command when it is unpickled."""

    def __reduce__(self):
        return (os.system, (f'echo x > "{self.marker}"',))


@pytest.mark.parametrize("kind", [Evil, Shell])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path, kind, zipped):
    marker = tmp_path / "it-ran"
    path = tmp_path / "evil.ckpt"
    content = {"state_dict": TENSORS, "x": kind(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileFormatError) as caught:
        open_source(path)
    assert not marker.exists()
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: expected tensors only, found code: ")
    assert ("open" if kind is Evil else "system") in sentence and "not run" in sentence
    # The control: a full unpickler does run it, so the test can fail.
    loaded = torch.load(path, weights_only=False)
    if kind is Evil:
        loaded["x"].close()
    assert marker.exists()


def test_harmless_names_do_nothing_even_when_called(tmp_path):
    marker = tmp_path / "it-ran"

    class Call:
        def __reduce__(self):
            import _codecs

            return (_codecs.encode, (str(marker), "latin1"))

    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": TENSORS, "x": Call()}, path)
    check(open_source(path))


def test_a_whole_model_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(FileFormatError, match="Linear"):
        open_source(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"a": {"x": 1}, "b": {"y": 2}}])
def test_a_checkpoint_without_tensors_is_refused(tmp_path, content):
    path = tmp_path / "m.ckpt"
    torch.save(content, path)
    with pytest.raises(FileFormatError, match="dict of tensors"):
        open_source(path)


def test_archives_and_pickles_of_others_are_refused(tmp_path):
    archive = tmp_path / "lora.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(FileFormatError, match=r"torch\.save"):
        open_source(archive)
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps({"x": [1.0]}, protocol=2))
    with pytest.raises(FileFormatError):
        open_source(plain)
    good = tmp_path / "m.ckpt"
    torch.save(TENSORS, good)
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(good.read_bytes()[:-100])
    with pytest.raises(FileFormatError):
        open_source(cut)


@pytest.mark.parametrize("gadget", GADGETS)
def test_no_function_is_called_in_whatever_way_it_is_asked_for(tmp_path, gadget):
    path = tmp_path / "evil.ckpt"
    for how, code in calls(gadget, str(tmp_path / "it-ran")).items():
        for form in (zipped(code), b"".join(map(pickle.dumps, LEGACY)) + code, code):
            path.write_bytes(form)
            with watching(tmp_path), pytest.raises(FileFormatError, match=r"evil\.ckpt: expected"):
                open_source(path)
            assert [entry.name for entry in tmp_path.iterdir()] == ["evil.ckpt"], how


@pytest.mark.parametrize("how", ["REDUCE", "STACK_GLOBAL", "INST", "OBJ", "BUILD", "a key"])
def test_a_full_unpickler_does_call_it(tmp_path, how):
    """The control: these pickles run what they name, so the test above can fail."""
    marker = tmp_path / "it-ran"
    code = calls("builtins exec", f"open({str(marker)!r}, 'w').close()")[how]
    with contextlib.suppress(Exception):
        pickle.loads(code)
    assert marker.exists()


def test_a_zip_that_unpacks_to_more_than_it_takes_is_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    path.write_bytes(zipped(b"\x80\x02" + bytes(2**24), compressed=True))
    assert path.stat().st_size < 100_000
    with pytest.raises(FileFormatError, match="unpacks to more"):
        open_source(path)


@pytest.mark.parametrize(
    ("size", "stride"),
    [((2**40,), (0,)), ((2**20, 2**20), (0, 0)), ((2**12, 2**12), (0, 1)), ((2**62,), (0,))],
)
def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path, size, stride):
    """A stride of zero makes terabytes of four bytes, without a word of torch."""
    path = tmp_path / "bomb.ckpt"
    path.write_bytes(zipped(state(rebuilt(2**12, size, stride)), [bytes(2**14)]))
    with pytest.raises(FileFormatError, match=r"bomb\.ckpt: expected"):
        open_source(path)


@pytest.mark.parametrize("numel", [2**12, 2**31, 2**40, 2**60, 2**64, -1])
def test_a_storage_that_claims_more_than_the_file_has_is_refused(tmp_path, numel):
    path = tmp_path / "bomb.ckpt"
    code = state(rebuilt(numel, (numel,), (1,)))
    head = b"".join(map(pickle.dumps, LEGACY))
    for form in (zipped(code, [bytes(16)]), head + code + pickle.dumps(["0"]) + bytes(24)):
        path.write_bytes(form)
        with pytest.raises(FileFormatError, match=r"bomb\.ckpt: expected"):
            open_source(path)


def test_tensors_that_share_a_storage_are_not_more_than_the_file(tmp_path):
    path = tmp_path / "m.ckpt"
    shared = torch.zeros(2**20)
    torch.save({"a": shared, "b": shared, "c": shared.view(2**10, 2**10), "d": shared}, path)
    assert len(open_source(path).specs) == 4
    torch.save({str(number): shared for number in range(100)}, path)
    with pytest.raises(FileFormatError, match="fill your memory"):
        open_source(path)


@pytest.mark.parametrize("version", ["2.6.0", "2.9.1+cu128", "1.13"])
def test_a_torch_whose_unpickler_is_unsafe_reads_no_pickles(tmp_path, monkeypatch, version):
    """CVE-2026-24747: before 2.10 it could be led to corrupt memory."""
    path = tmp_path / "m.ckpt"
    torch.save(TENSORS, path)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(FileFormatError, match=r"torch 2\.10 or newer"):
        open_source(path)
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git123")
    check(open_source(path))
