"""Pickles that try to run something, in every way that the format knows."""

import io
import pickle
import struct
import zipfile
from collections.abc import Sequence

from hypothesis import strategies as st

GADGETS = (
    *("builtins eval", "builtins exec", "builtins getattr", "builtins __import__"),
    *("builtins compile", "builtins open", "builtins setattr", "builtins globals"),
    *("os system", "os popen", "os execvp", "os remove", "os mkdir", "posix system", "nt system"),
    *("subprocess Popen", "subprocess check_output", "pty spawn", "webbrowser open"),
    *("shutil rmtree", "pathlib Path.touch", "tempfile mkdtemp", "io open", "_io FileIO"),
    *("pickle loads", "_pickle loads", "marshal loads", "shelve open", "copyreg _reconstructor"),
    *("importlib import_module", "runpy run_path", "runpy _run_code", "code interact"),
    *("operator attrgetter", "operator methodcaller", "functools partial", "types FunctionType"),
    *("timeit timeit", "cProfile run", "pdb run", "doctest debug_script", "bdb Bdb.run"),
    *("ctypes CDLL", "socket create_connection", "urllib.request urlopen", "sys exit"),
    *("torch load", "torch.hub load", "torch.jit load", "torch.serialization load"),
    *("torch.utils.cpp_extension load_inline", "torch._dynamo.guards GuardBuilder.get"),
    *("numpy load", "numpy.testing._private.utils runstring", "numpy.f2py.crackfortran myeval"),
    *("lorakit.tensorfile.replacing replaced_file", "lorakit.cli lorakit"),
)
"""Modules and names of functions that a pickle would call."""
HARMLESS = (
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"),
    *("torch._utils _rebuild_parameter", "torch.storage _load_from_bytes", "torch Size"),
    *("numpy.core.multiarray scalar", "numpy dtype", "_codecs encode", "torch device"),
    *("pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint", "torch Tensor"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch float32"),
)


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def calls(gadget: str, argument: str) -> dict[str, bytes]:
    """Return pickles that call a function with a text, by the opcode that they do it with."""
    module, name = gadget.split(" ")
    function = f"c{module}\n{name}\n".encode()
    stacked = text(module) + text(name) + b"\x93"
    given = text(argument)
    return {
        "REDUCE": b"\x80\x02" + function + given + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + stacked + given + b"\x85R.",
        "INST": b"\x80\x02(" + given + f"i{module}\n{name}\n.".encode(),
        "OBJ": b"\x80\x02(" + function + given + b"o.",
        "NEWOBJ": b"\x80\x02" + function + given + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + function + given + b"\x85}\x92.",
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R" + function + given + b"\x85Rb.",
        "a key": b"\x80\x02}" + function + given + b"\x85R" + b"Ns.",
        "a persistent id": b"\x80\x02" + function + given + b"\x85RQ.",
    }


def zipped(code: bytes, storages: Sequence[bytes] = (), *, compressed: bool = False) -> bytes:
    """Put a pickle where torch.save would."""
    target = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(target, "w", method) as archive:
        archive.writestr("archive/data.pkl", code)
        archive.writestr("archive/byteorder", "little")
        for number, raw in enumerate(storages):
            archive.writestr(f"archive/data/{number}", raw)
        archive.writestr("archive/version", "3\n")
    return target.getvalue()


def storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """Return the opcodes of a reference to a storage."""
    number = pickle.dumps(numel, protocol=2)[2:-1]
    parts = text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number
    return b"(" + parts + b"tQ"


def rebuilt(numel: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """Return the opcodes of a tensor that claims what it likes."""
    plain = pickle.dumps((offset, size, stride), protocol=2)
    # The three are spread over the stack, behind the storage.
    opcodes = b"".join(pickle.dumps(part, protocol=2)[2:-1] for part in pickle.loads(plain))
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(numel) + opcodes + hooks + b"tR"


def state(tensor: bytes) -> bytes:
    """Return a pickle of {'w': tensor}."""
    return b"\x80\x02}" + text("w") + tensor + b"s."


_STACK = (
    *(b"(", b"t", b"0", b"\x85", b"R", b"b", b"s", b"u", b"e", b"}", b"]", b")", b"Q", b"2"),
    *(b"q\0", b"h\0", b"a", b"\x81", b"o", b"\x93", b"\x82\1", b"N"),
)
"""Opcodes that move what is on the stack."""
LEGACY = (
    0x1950A86A20F9469CFC6C,
    1001,
    {
        "protocol_version": 1001,
        "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    },
)
"""What stands before the pickle in the older form."""
_NUMBERS = st.just(4) | st.integers(-2, 2**65) | st.integers(0, 8)
_SIZES = st.lists(st.integers(-1, 2**62) | st.integers(0, 4), max_size=3).map(tuple)


@st.composite
def opcodes(draw: st.DrawFn) -> bytes:
    """A pickle: a state dict of tensors that claim anything, and calls of anything."""
    # One that is right, so that the others are not all that is there.
    steps = [text("fine") + rebuilt(4, (2, 2), (2, 1)) + b"s"] * draw(st.integers(0, 1))
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["tensor", "call", "value", "stack", "bytes"]))
        if kind == "tensor":
            offset = draw(st.just(0) | st.integers(-2, 2**62))
            made = rebuilt(draw(_NUMBERS), draw(_SIZES), draw(_SIZES), offset)
            steps.append(text("w") + made + b"s")
        elif kind == "call":
            gadget = draw(st.sampled_from([*GADGETS, *HARMLESS]))
            how = calls(gadget, draw(st.text(max_size=4)))
            steps.append(draw(st.sampled_from(sorted(how.values())))[2:-1])
        elif kind == "value":
            value = draw(st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers()))
            steps.append(pickle.dumps(value, protocol=2)[2:-1])
        elif kind == "stack":
            steps.append(draw(st.sampled_from(_STACK)))
        else:
            steps.append(draw(st.binary(max_size=6)))
    return b"\x80\x02}" + b"".join(steps) + b"."


@st.composite
def checkpoints(draw: st.DrawFn) -> bytes:
    """A checkpoint of torch.save: a zip, the older form, or a pickle alone."""
    code = draw(opcodes())
    form = draw(st.sampled_from(["zip", "zip", "zip", "legacy", "plain", "packed"]))
    if form == "plain":
        return code
    if form == "legacy":
        raw = b"".join(pickle.dumps(part, protocol=2) for part in LEGACY)
        keys = pickle.dumps(draw(st.lists(st.sampled_from(["0", "1"]), max_size=2)), protocol=2)
        return raw + code + keys + draw(st.binary(max_size=40))
    raw = draw(st.just([bytes(16)]) | st.lists(st.binary(max_size=24), max_size=2))
    made = bytearray(zipped(code, raw, compressed=form == "packed"))
    for _ in range(max(0, draw(st.integers(-3, 2)))):
        made[draw(st.integers(0, len(made) - 1))] = draw(st.integers(0, 255))
    return bytes(made)
