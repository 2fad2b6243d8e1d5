"""What is in flight at once on full-size Flux, told from a file that has a header and no bytes."""

import sys

import pytest
from realnames import layout

import lorakit
from lorakit.compute import DEFAULT_MEMORY
from lorakit.models import Applied, Model, Rounded, open_model, stored_specs
from lorakit.operations.choice import Choice
from lorakit.operations.extract import extract_pieces
from lorakit.operations.spectra import bytes_of_group
from lorakit.tensorfile.header import Spec, format_header

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the file would be 24 GB there")
RULE = lorakit.RankRule(rank=32)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Model:
    specs = {key: Spec("BF16", shape) for key, shape in layout("flux1_dev_bfl").items()}
    path = tmp_path_factory.mktemp("flux") / "flux.safetensors"
    header = format_header(specs, {})
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(len(header) + sum(spec.nbytes for spec in specs.values()))
    return open_model(lorakit.open_source(path))


@pytest.mark.parametrize(("stored", "fit"), [("BF16", True), ("F16", True), ("F32", False)])
def test_two_of_the_largest_layers_are_baked_at_once(flux: Model, stored: str, fit: bool) -> None:
    """With one at a time a core would wait while it is read and written."""
    applied = Applied(base=flux.source, addends={}, metadata={})
    model = Rounded(applied=applied, specs=stored_specs(applied, stored))
    largest = max(model.specs, key=lambda key: model.specs[key].numel)
    both = 2 * model.bytes_an_element(largest) * model.specs[largest].numel
    assert (both <= DEFAULT_MEMORY) is fit


@pytest.mark.parametrize(("least_change", "fit"), [(0.0, True), (0.1, False)])
def test_the_two_large_layers_of_a_block_are_extracted_at_once(
    flux: Model, least_change: float, fit: bool
) -> None:
    """Read block by block they take their difference alone; else both weights besides."""
    pieces, _ = extract_pieces(flux, flux, choice=Choice(min_change=least_change))
    sizes = {piece.shape: bytes_of_group([piece], RULE) for piece in pieces if not piece.vector}
    assert (sizes[21504, 3072] + sizes[3072, 15360] <= DEFAULT_MEMORY) is fit
    # A difference is held in fp32, whatever else.
    assert all(size > 4 * rows * columns for (rows, columns), size in sizes.items())
