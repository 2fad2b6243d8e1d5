"""Whether what a file says of its own bytes is true."""

from lorakit.compute import Compute, ordered_map
from lorakit.progress import Progress, silent
from lorakit.tensorfile.casting import is_finite
from lorakit.tensorfile.hashes import HASHES
from lorakit.tensorfile.plain import FileSource, TensorSource
from lorakit.tensorfile.relabel import Hash, Stored, check_hashes

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def check_claims(source: TensorSource) -> tuple[Hash, ...]:
    """Recompute the hashes that a file's metadata names; those that it does not name are left out.

    Raises:
        FileFormatError: the file cannot be read whole.

    Cost: one pass over the data, none where no hash is named.
    """
    if not isinstance(source, FileSource) or not any(key in source.metadata for key in HASHES):
        return ()
    found = check_hashes(Stored(path=source.path, header=source.header))
    return tuple(claim for claim in found if claim.stored is not None)


def not_finite(
    source: TensorSource, *, compute: Compute, progress: Progress = silent
) -> tuple[str, ...]:
    """Return the keys of the tensors that hold NaN or infinity.

    Raises:
        FileFormatError: the file cannot be read whole.

    Cost: one pass over the data.
    """
    keys = [key for key, spec in source.specs.items() if spec.dtype in _FLOATS]
    checks = ordered_map(
        lambda key: is_finite(source.get(key)),
        keys,
        compute=compute,
        cost=lambda key: 6 * source.specs[key].nbytes,
    )
    odd = []
    for done, (key, fine) in enumerate(zip(keys, checks, strict=True), start=1):
        if not fine:
            odd.append(key)
        progress("checked", done, len(keys))
    return tuple(odd)
