"""What PEFT saves of every kind, we bake as PEFT merges it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.lorafile import load_lora
from lorakit.operations.apply import apply
from lorakit.peftconfig import WEIGHTS
from lorakit.tensorfile.source import DictSource

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]

LINEAR, CONV = ["q_proj", "k_proj"], ["q_proj", "conv"]
KINDS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=CONV),
    "patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=CONV,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"conv": 7},
    ),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=CONV, use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=CONV, use_dora=True),
    "bias": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=LINEAR, lora_bias=True),
    "embedding": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=["tokens", "q_proj"]),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=CONV),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=1, target_modules=CONV),
    "lokr whole": lambda: peft.LoKrConfig(r=64, alpha=7, target_modules=CONV),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, target_modules=CONV),
    "oft exact": lambda: peft.OFTConfig(
        oft_block_size=8, target_modules=CONV, use_cayley_neumann=False
    ),
    "oft of three terms": lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=CONV, num_cayley_neumann_terms=3
    ),
    "oft of one block for all": lambda: peft.OFTConfig(
        r=2, oft_block_size=0, target_modules=LINEAR, block_share=True
    ),
    "oft constrained": lambda: peft.OFTConfig(
        oft_block_size=8, target_modules=LINEAR, coft=True, eps=0.5
    ),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=CONV),
    "boft of three stages": lambda: peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=3, target_modules=LINEAR
    ),
    "every bias": lambda: peft.LoraConfig(r=4, lora_alpha=2, target_modules=LINEAR, bias="all"),
    "the layers' biases": lambda: peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=CONV, bias="lora_only"
    ),
    "saved modules": lambda: peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["q_proj"], modules_to_save=["tokens", "k_proj"]
    ),
    "ia3": lambda: peft.IA3Config(target_modules=LINEAR, feedforward_modules=["k_proj"]),
}


class Tiny(nn.Module):
    """Layers of each shape, under names that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 16)
        self.q_proj = nn.Linear(16, 24)
        self.k_proj = nn.Linear(16, 24)
        self.conv = nn.Conv2d(16, 24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(self.tokens(x)) + self.k_proj(self.tokens(x))  # type: ignore[no-any-return]


class _BlockDiagonal:
    """What PEFT has only as a kernel for CUDA, and without which BOFT has one stage."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*stage) for stage in blocks])]  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_baked_as_peft_merges_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", _BlockDiagonal)
    torch.manual_seed(0)
    model = Tiny()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, KINDS[kind]())
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
            elif parameter.requires_grad:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload().state_dict()
    applied, report = apply(DictSource(base), [(load_lora(tmp_path / "adapter"), 1.0)])
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert {key for key in base if not torch.equal(applied.get(key), base[key])} == changed
    assert len(report.rows) == len(changed)
    for key in base:
        torch.testing.assert_close(applied.get(key), merged[key], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["ADALORA", "VERA", "HRA"])
def test_a_type_whose_settings_decide_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    from lorakit.errors import FileFormatError

    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind}"}}', encoding="utf-8")
    with pytest.raises(FileFormatError, match=f"found {kind}"):
        load_lora(tmp_path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer replication"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trained tokens"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"arrow_config": {"top_k": 2}}, "Arrow"),
        ({"kasa_config": {}, "velora_config": {"rank": 1}}, "VeLoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16, which changed the base"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "loftq"}, "loftq"),
    ],
)
def test_a_setting_that_asks_for_more_than_a_change_is_refused_by_name(
    setting: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """The same folder is read without the setting."""
    from lorakit.errors import AdapterError

    keys = ("base_model.model.x.0.y.lora_A.weight", "base_model.model.x.0.y.lora_B.weight")
    save_file({keys[0]: torch.ones(2, 4), keys[1]: torch.ones(4, 2)}, tmp_path / WEIGHTS[0])
    config = tmp_path / "adapter_config.json"
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": True}
    config.write_text(json.dumps(plain), encoding="utf-8")
    assert len(load_lora(tmp_path).adapters) == 1
    config.write_text(json.dumps(plain | setting), encoding="utf-8")
    with pytest.raises(AdapterError, match=words):
        load_lora(tmp_path)


def test_peft_reads_the_biases_that_we_write(tmp_path: Path) -> None:
    """PEFT's lora_bias, through lorakit into a folder of ours, merges to what it was."""
    from lorakit.saving import Output, save_lora

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(Tiny(), KINDS["bias"]())
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    wrapped.save_pretrained(tmp_path / "theirs")
    save_lora(
        tmp_path / "ours",
        load_lora(tmp_path / "theirs"),
        output=Output(dialect="peft", dtype="F32"),
    )
    torch.manual_seed(0)
    read = peft.PeftModel.from_pretrained(Tiny(), tmp_path / "ours").merge_and_unload().state_dict()
    merged = wrapped.merge_and_unload().state_dict()
    assert not torch.equal(merged["q_proj.bias"], Tiny().state_dict()["q_proj.bias"])
    for key, value in merged.items():
        torch.testing.assert_close(read[key], value, rtol=1e-5, atol=2e-6)
