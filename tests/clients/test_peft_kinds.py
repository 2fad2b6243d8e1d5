"""What PEFT saves of every kind, we bake as PEFT merges it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.lorafile import load_lora
from lorakit.operations.apply import apply
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_baked_as_peft_merges_it(kind: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["OFT", "BOFT", "VERA"])
def test_a_type_whose_settings_decide_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    from lorakit.errors import FileFormatError

    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "{kind}"}}', encoding="utf-8")
    with pytest.raises(FileFormatError, match=f"found {kind}"):
        load_lora(tmp_path)
