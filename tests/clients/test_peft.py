"""PEFT reads lorakit's folders, lorakit reads PEFT's; the ΔW is the same."""

import json

import pytest
import synthetic
import torch
from torch import nn

import lorakit
from tests import reference
from tests.clients import models
from tests.helpers import ran, tensors_of

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytestmark = [
    *models.peers(),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning"),
]

STORED = 1e-6
"""Of a ΔW: factors in fp32, rank below 16. PEFT multiplies them in fp32 too."""


@pytest.fixture(scope="module")
def difference(tmp_path_factory, make_folder):  # type: ignore[no-untyped-def]
    """Return a PEFT folder that `lorakit extract` wrote, and its ΔW = after − before."""
    root = tmp_path_factory.mktemp("difference")
    sides, terms = [], []
    for seed, (rank, conv, dialect) in enumerate([(3, True, "kohya"), (5, False, "diffusers")]):
        tensors = models.lora("sd1", dialect, rank=rank, alpha=2, seed=seed, conv=conv, dtype="F32")
        sides.append(synthetic.write_lora(root / f"{seed}.safetensors", tensors))
        terms.append((models.deltas("sd1", dialect, tensors), 2.0 * seed - 1))
    ran("extract", *sides, "--to", "peft", "-o", root / "peft", "--dtype", "fp32")
    return root / "peft", models.summed(terms)


def only(change: models.Deltas, component: str) -> models.Deltas:
    return {key: delta for key, delta in change.items() if key[0] == component}


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_peft_loads_and_merges_an_extracted_folder(difference, make_folder, component: str) -> None:  # type: ignore[no-untyped-def]
    folder, change = difference[0], only(difference[1], component)
    config = json.loads((folder / component / "adapter_config.json").read_text())
    if component == "unet":
        assert len({config["r"], *config["rank_pattern"].values()}) > 1, "ranks must differ"
    model = models.load(make_folder("sd1", dtype="F32"), component)
    before = models.weights({component: model}, change)
    adapted = peft.PeftModel.from_pretrained(model, folder / component)
    wrapped = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(wrapped) == len(change) > 10
    assert models.worst_change({component: model}, before, change) == 1.0, "nothing is merged yet"
    merged = {component: adapted.merge_and_unload()}
    assert models.worst_change(merged, before, change) < STORED


def test_diffusers_loads_the_extracted_unet(difference, make_folder) -> None:  # type: ignore[no-untyped-def]
    folder, change = difference[0], only(difference[1], "unet")
    base = make_folder("sd1", dtype="F32")
    unet = models.load(base, "unet")
    before, plain = models.weights({"unet": unet}, change), models.outputs({"unet": unet})
    expected = models.outputs(models.changed({"unet": models.load(base, "unet")}, change))
    tensors = tensors_of(folder / "unet" / "adapter_model.safetensors")
    unet.load_lora_adapter(tensors, prefix="base_model.model")
    found = models.outputs({"unet": unet})
    assert models.distances(found, expected)["unet"] < 1e-7
    assert models.distances(plain, expected)["unet"] > 1e-3
    unet.fuse_lora()
    assert models.worst_change({"unet": unet}, before, change) < STORED


def test_ranks_by_module_from_an_extracted_model(make_checkpoint, make_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Every layer has its own rank; PEFT once loaded none but the common one (PEFT 3737)."""
    tuning = synthetic.Tuning(rank=8, scale=0.05)
    base = make_checkpoint("sd1", dtype="F32")
    tuned = make_checkpoint("sd1", dtype="F32", tuning=tuning)
    out = tmp_path / "peft"
    options = (
        "--only",
        "^unet.*(attn1|ff|conv1)",
        "--energy",
        "0.9",
        "--dtype",
        "fp32",
        "--to",
        "peft",
    )
    ran("extract", base, tuned, *options, "-o", out)
    config = json.loads((out / "adapter_config.json").read_text())
    assert len({config["r"], *config["rank_pattern"].values()}) > 2
    folders = [make_folder("sd1", dtype="F32", **told) for told in ({}, {"tuning": tuning})]
    plain, goal = (models.load(folder, "unet") for folder in folders)
    before = {n: p.detach().clone() for n, p in plain.named_parameters()}
    merged = peft.PeftModel.from_pretrained(plain, out).merge_and_unload()
    kept, whole = [], []
    for module in lorakit.load_lora(out).adapters:
        name = module.removeprefix("unet.") + ".weight"
        wanted = goal.get_parameter(name) - before[name]
        kept.append((goal.get_parameter(name) - merged.get_parameter(name)).norm() ** 2)
        whole.append(wanted.norm() ** 2)
        assert kept[-1] <= 0.1001 * whole[-1], "each layer keeps 90 % of its energy"
    assert len(kept) > 50
    assert sum(kept) / sum(whole) > 0.01, "the rank was cut, so something is missing"


# PEFT sorts a configuration's keys when it saves: patterns that overlap stand in that order here.
VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"attn1.to_q": 6, r"^down_blocks\.0\..*to_out\.0": 2, "conv1": 5},
        "alpha_pattern": {"attn1.to_q": 9, r"mid_block\..*": 1, "to_q": 3},
    },
    "patterns and rslora": {
        "use_rslora": True,
        "rank_pattern": {"ff.net.2": 7, "mlp.fc1": 3},
        "alpha_pattern": {"ff.net.2": 5, "mlp.fc1": 2, "to_v": 2},
    },
}
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "net.2", "conv1", "conv_shortcut"],
    "text_encoder": ["q_proj", "v_proj", "out_proj", "fc1"],
}


def random_peft(model: nn.Module, component: str, options: dict[str, object]) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[component], **options)
    adapted = peft.get_peft_model(model.float(), config)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return adapted


@pytest.mark.parametrize(
    ("component", "variant"),
    [*(("unet", name) for name in VARIANTS), ("text_encoder", "patterns and rslora")],
)
def test_a_folder_of_peft_is_read(make_folder, tmp_path, variant: str, component: str) -> None:  # type: ignore[no-untyped-def]
    model = models.load(make_folder("sd1", dtype="F32"), component)
    adapted = random_peft(model, component, VARIANTS[variant])
    place = tmp_path / component
    adapted.save_pretrained(place)
    found = lorakit.load_lora(tmp_path if component == "text_encoder" else place).adapters
    expected = {}
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            path = name if component == "unet" else f"text_model.{name}"
            expected[f"{component}.{path}"] = (layer, layer.get_delta_weight("default").detach())
    assert found.keys() == expected.keys()
    scales = set()
    for module, (layer, delta) in expected.items():
        factors = found[module].tensors()
        alpha = float(factors["alpha"])
        ours = reference.delta(factors["up"], factors["down"], alpha)
        scales.add(round(layer.scaling["default"], 6))

        def check(answer: torch.Tensor, delta: torch.Tensor = delta, name: str = module) -> None:
            error = reference.relative_error(answer.reshape(delta.shape), delta)
            assert error < STORED, f"{name}: {error}"

        reference.negative_control(check, ours)
    if "pattern" in variant:
        assert len(scales) > 1 and len({adapter.rank for adapter in found.values()}) > 1


def test_a_round_trip_through_lorakit_keeps_pefts_weights(make_folder, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """PEFT writes with rsLoRA and patterns, lorakit reads and writes, PEFT reads."""
    base = make_folder("sd1", dtype="F32")
    written = random_peft(models.load(base, "unet"), "unet", VARIANTS["patterns and rslora"])
    written.save_pretrained(tmp_path / "theirs")
    lora = lorakit.load_lora(tmp_path / "theirs")
    lorakit.save_lora(tmp_path / "ours", lora, output=lorakit.Output(dialect="peft", dtype="F32"))
    read = peft.PeftModel.from_pretrained(models.load(base, "unet").float(), tmp_path / "ours")
    layers = dict(read.named_modules())
    count = 0
    for name, layer in written.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            ours, theirs = (x.get_delta_weight("default").detach() for x in (layers[name], layer))
            assert reference.relative_error(ours, theirs) < STORED, name
            count += 1
    assert count > 100
