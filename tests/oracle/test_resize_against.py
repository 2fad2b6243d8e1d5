"""Base-aware resize against the formulas in float64; resize_lora's faults are tests here."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest
import synthetic
import torch
from torch import Tensor

import lorakit
from lorakit.errors import AdapterError, LorakitError, NumericsError, SpecError, UnmatchedError
from lorakit.linalg.ranks import RankRule
from lorakit.lorafile import LoraFile
from lorakit.names.architectures import Architecture
from lorakit.names.families import ARCHITECTURES
from lorakit.names.lorakeys import read_keys
from lorakit.operations.budget import OWN
from lorakit.operations.resize import resize, yardsticks
from lorakit.report import Report
from lorakit.tensorfile.source import DictSource, TensorSource
from tests import layouts, reference
from tests.conftest import FACTOR
from tests.helpers import FP16, FP32, dense, few, metadata_of, ran, tensors_of, worst_error
from tests.oracle.test_architectures import ends, lora_file

SCORES = ("spn-ckpt", "fro-ckpt", "spn-lora", "fro-lora", "subspace")
BLEND = "spn_ckpt=3,fro-lora=1,subspace=0.5"
SHARES = {"spn-ckpt": 3 / 4.5, "fro-lora": 1 / 4.5, "subspace": 0.5 / 4.5}
CLOSE = 1e-4
"""Of a score: spectral norms are good to 1e-4 relative, the rest to the rounding of fp32."""


@dataclass(frozen=True)
class Twin:
    """A layer's directions by the textbook: SVD of the dense ΔW, scores by the formula."""

    delta: Tensor
    weight: Tensor
    rank: int
    shares: Mapping[str, float]
    rescale: float = 1.0
    names: int = 0

    @cached_property
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(self.delta, full_matrices=False)
        return u[:, : self.rank], s[: self.rank], vh[: self.rank]

    @cached_property
    def scores(self) -> Tensor:
        u, s, vh = self.svd
        references = {
            "spn-ckpt": lambda: torch.linalg.matrix_norm(self.weight, 2),
            "fro-ckpt": lambda: self.weight.norm(),
            "spn-lora": lambda: s[0],
            "fro-lora": lambda: self.delta.norm(),
            "subspace": lambda: torch.einsum("mk,mn,kn->k", u, self.weight, vh).abs(),
        }
        logs = [share * references[name]().log10() for name, share in self.shares.items()]
        return (s * self.rescale).log10() - sum(logs)

    @cached_property
    def ordered(self) -> Tensor:
        return self.scores.sort(descending=True).values

    def kept(self, threshold: float) -> Tensor:
        """Return Σ of the directions whose score reaches the threshold."""
        u, s, vh = self.svd
        at = self.scores >= threshold
        return self.rescale * (u[:, at] * s[at]) @ vh[at]

    @property
    def price(self) -> int:
        """Bytes of a direction in fp16."""
        return 2 * sum(self.delta.shape)

    @cached_property
    def a_byte(self) -> list[float]:
        """(σ / reference)² a byte; the first directions share the layer's entries in the header."""
        worth = [10 ** (2 * float(score)) for score in self.ordered]
        shared = [
            sum(worth[: i + 1]) / (self.names + (i + 1) * self.price) for i in range(len(worth))
        ]
        first = shared.index(max(shared)) + 1
        return [max(shared)] * first + [value / self.price for value in worth[first:]]


@cache
def weights_of(checkpoint: Path, architecture: str) -> dict[str, Tensor]:
    """Return module -> weight [m, n] in float64, as the layouts' own tables have them."""
    tensors, found = tensors_of(checkpoint), {}
    for key, place in synthetic.folder_places(architecture).items():
        matrix = place.key in tensors and tensors[place.key].ndim > 1
        if not matrix or not key.endswith(".weight"):
            continue
        tensor = tensors[place.key].double()
        start, stop = synthetic.row_range(place, tuple(tensor.shape))
        tensor = tensor if place.rows is None else tensor[start:stop]
        tensor = tensor.T if place.transposed else tensor
        found[key.replace("/", ".", 1).removesuffix(".weight")] = tensor.flatten(1)
    return found


@cache
def twins(
    lora: LoraFile | Path, checkpoint: Path, architecture: str, score: str, rescale: float = 1.0
) -> dict[str, Twin]:
    file = lorakit.load_lora(lora) if isinstance(lora, Path) else lora
    weights = weights_of(checkpoint, architecture)
    shares = SHARES if score == BLEND else {score: 1.0}
    names = {} if file is lora else names_in_header(lora)
    return {
        module: Twin(
            delta,
            weights[module],
            file.adapters[module].rank or 0,
            shares,
            rescale,
            names.get(module, 0),
        )
        for module, delta in dense(file).items()
    }


def names_in_header(path: Path) -> dict[str, int]:
    """Return the bytes that each module's entries take in a file's header, and its alpha."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = header.pop("__metadata__", {})
    found = read_keys({key: tuple(entry["shape"]) for key, entry in header.items()}, metadata)
    return {
        module: 4
        + sum(
            len(json.dumps({key: header[key]}, separators=(",", ":"))) - 1
            for key in spellings[0].keys.values()
        )
        for module, spellings in found.modules.items()
    }


def between(found: Mapping[str, Twin], share: float = 0.5) -> float:
    """Return a threshold that no score is near: rounding must not decide."""
    scores = torch.cat([twin.scores for twin in found.values()]).sort().values
    middle = int(len(scores) * share)
    near = scores[middle - 20 : middle + 20]
    widest = int(near.diff().argmax())
    return float(near[widest : widest + 2].mean())


def told(report: Report, found: Mapping[str, Twin], threshold: float) -> None:
    """Check what the report says of every layer."""
    for row in report.rows:
        scores = found[row.module].ordered
        rank = int((scores >= threshold).sum())
        assert row.rank_after == rank, row.module
        for said, place in ((row.score_kept, rank - 1), (row.score_cut, rank)):
            if 0 <= place < len(scores):
                assert said == pytest.approx(float(scores[place]), abs=CLOSE)
            else:
                assert said is None


@pytest.mark.parametrize(
    ("score", "rescale"), [*((score, 1.0) for score in SCORES), (BLEND, 1.0), (BLEND, 0.3)]
)
def test_every_score_is_the_formula(
    sd15: Path, sd15_lora: Path, score: str, rescale: float
) -> None:
    exact = twins(sd15_lora, sd15, "sd1", score, rescale)
    threshold = between(exact)
    lora = lorakit.load_lora(sd15_lora)
    base = lorakit.open_source(sd15)
    rule = RankRule(threshold=threshold)
    resized, report = resize(lora, rule=rule, against=base, score=score, rescale=rescale)
    told(report, exact, threshold)
    kept = {module: twin.kept(threshold) for module, twin in exact.items()}
    kept = {module: delta for module, delta in kept.items() if bool(delta.any())}
    assert worst_error(dense(resized), kept) < FP32 * 100, "directions of close σ may turn"
    assert report.dropped == tuple(m for m in exact if m not in kept)
    assert report.scoring is not None and report.scoring.score == score
    for row in report.rows:
        whole = rescale * exact[row.module].delta
        error = reference.relative_error(kept.get(row.module, 0 * whole), whole)
        assert row.error == pytest.approx(error, abs=1e-4)
        assert row.norm == pytest.approx(float(whole.norm()), rel=1e-5)


def test_the_check_of_scores_can_fail(sd15: Path, sd15_lora: Path) -> None:
    exact = twins(sd15_lora, sd15, "sd1", "fro-ckpt")
    lora, base = lorakit.load_lora(sd15_lora), lorakit.open_source(sd15)
    (yardstick,) = yardsticks([lora], score="fro-ckpt", against=base)
    answer = torch.stack([10 ** yardstick.references[module] for module in exact])

    def check(found: Tensor) -> None:
        expected = torch.stack([twin.weight.norm() for twin in exact.values()])
        torch.testing.assert_close(found, expected, rtol=CLOSE, atol=0)

    reference.negative_control(check, answer)


def test_a_subspace_may_keep_a_smaller_singular_value(sd15: Path, sd15_lora: Path) -> None:
    """It is the one score that ranks directions otherwise than their singular values."""
    exact = twins(sd15_lora, sd15, "sd1", "subspace")
    turned = [m for m, twin in exact.items() if bool((twin.scores.diff() > 0).any())]
    assert len(turned) > 50
    lora, base = lorakit.load_lora(sd15_lora), lorakit.open_source(sd15)
    rule = RankRule(rank=2)
    resized, _ = resize(lora, rule=rule, against=base, score="subspace")
    for module in turned[:50]:
        best = exact[module].ordered
        if best[1] - best[2] < 1e-3:
            continue
        kept = exact[module].kept(float(best[1:3].mean()))
        assert reference.relative_error(dense(resized)[module], kept) < 1e-4


def small(architecture: str = "sd1", *, every: int = 1, **options: object) -> dict[str, Tensor]:
    tensors = synthetic.lora_tensors(architecture, factor=FACTOR, rank=4, **options)  # type: ignore[arg-type]
    return few(tensors, every=every)


@pytest.mark.parametrize("score", ["fro-ckpt", "spn-ckpt", "fro-lora", "subspace"])
@pytest.mark.parametrize("size", [60_000, 90_000])
def test_a_size_goes_to_the_most_score_a_byte(
    sd15: Path, sd15_lora: Path, tmp_path: Path, score: str, size: int
) -> None:
    out = tmp_path / "small.safetensors"
    how = ["--against", sd15, "--score", score, "--size", size]
    report = ran("resize", sd15_lora, *how, "-o", out)
    assert 0.94 * size < out.stat().st_size <= size
    exact = twins(sd15_lora, sd15, "sd1", score)
    ranks = {row["module"]: row["rank_after"] for row in report["rows"]}
    kept = [
        (exact[m].a_byte[i], exact[m].price + (0 if i else exact[m].names))
        for m, rank in ranks.items()
        for i in range(rank)
    ]
    budget = budget_of(out, size)
    assert sum(cost for _, cost in kept) <= budget + DIGITS * len(ranks)
    assert len(kept) > 50
    for module, rank in ranks.items():
        twin = exact[module]
        if rank < twin.rank:
            better = sum(c for a_byte, c in kept if a_byte > twin.a_byte[rank] * (1 - NEAR))
            cost = twin.price + (0 if rank else twin.names)
            room = budget - better - DIGITS * len(ranks)
            assert cost > room, "it had no room beside all that is better"


DIGITS = 12
"""Offsets and ranks of the input's header have other numbers of digits than the output's."""
NEAR = 0.03
"""So that what a layer's names cost may be off by as much."""


def budget_of(written: Path, size: int) -> int:
    return size - OWN - len(json.dumps(metadata_of(written), ensure_ascii=False))


def test_a_size_is_spent_better_than_by_score_alone(
    sd15: Path, sd15_lora: Path, tmp_path: Path
) -> None:
    """resize_lora describes a score a byte and ranks by the score alone."""
    out, size = tmp_path / "small.safetensors", 90_000
    report = ran("resize", sd15_lora, "--against", sd15, "--size", size, "-o", out)
    exact = twins(sd15_lora, sd15, "sd1", "fro-ckpt")
    worth = {m: 10 ** (2 * twin.scores) for m, twin in exact.items()}
    ours = sum(float(worth[row["module"]][: row["rank_after"]].sum()) for row in report["rows"])
    items = [(float(w), m, i) for m, all_ in worth.items() for i, w in enumerate(all_)]
    budget, theirs = budget_of(out, size), 0.0
    for value, module, place in sorted(items, key=lambda item: -item[0]):
        cost = exact[module].price + (0 if place else exact[module].names)
        if cost > budget:
            break
        budget, theirs = budget - cost, theirs + value
    assert ours > 1.01 * theirs


@pytest.mark.parametrize("score", ["fro-ckpt", "subspace"])
def test_a_size_holds_in_the_dtype_that_is_written(
    sd15: Path, sd15_lora: Path, tmp_path: Path, score: str
) -> None:
    for dtype in ("fp32", "bf16"):
        out = tmp_path / f"{dtype}.safetensors"
        how = ["--against", sd15, "--score", score, "--size", 90_000, "--dtype", dtype]
        ran("resize", sd15_lora, *how, "-o", out)
        assert 86_000 < out.stat().st_size <= 90_000


def result(lora: LoraFile, base: TensorSource, **options: object) -> tuple[LoraFile, Report]:
    chosen = {"rule": RankRule(threshold=-2.4), "score": "fro-ckpt", **options}
    return resize(lora, against=base, **chosen)  # type: ignore[arg-type]


def scores_of(report: Report) -> dict[str, tuple[float | None, float | None]]:
    return {row.module: (row.score_kept, row.score_cut) for row in report.rows}


@pytest.mark.parametrize("score", SCORES)
def test_neither_the_factors_nor_their_order_matter(sd15: Path, score: str) -> None:
    """Gauge: (10 · up, down / 10), and a turned basis inside."""
    tensors, base = small(every=3, dtype="F32"), lorakit.open_source(sd15)
    g = torch.Generator().manual_seed(0)
    turned = dict(reversed(tensors.items()))
    for key in [key for key in tensors if key.endswith("lora_up.weight")]:
        down = key.replace("lora_up", "lora_down")
        q = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=torch.float64))[0]
        turned[key] = 10 * torch.einsum("mr...,rk->mk...", tensors[key].double(), q).float()
        turned[down] = torch.einsum("rk,r...->k...", q, tensors[down].double()).float() / 10
    exact = twins(lorakit.load_lora(tensors), sd15, "sd1", score)
    rule = RankRule(threshold=between(exact))
    (a, first), (b, second) = (
        result(lorakit.load_lora(one), base, rule=rule, score=score) for one in (tensors, turned)
    )
    assert [row.rank_after for row in first.rows] == [row.rank_after for row in second.rows]
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one.score_kept == pytest.approx(other.score_kept, abs=1e-3)
    assert worst_error(dense(a), dense(b)) < 1e-3


@pytest.mark.parametrize(
    ("architecture", "score", "least"), [("sdxl", BLEND, 700), ("sd1", "subspace", 150)]
)
def test_both_layouts_are_scored_alike(
    make_checkpoint: Callable[..., Path],
    make_folder: Callable[..., Path],
    make_lora: Callable[..., Path],
    architecture: str,
    score: str,
    least: int,
) -> None:
    """The dialects, too: one layout's weights lie transposed or joined in the other."""
    model, folder = make_checkpoint(architecture), make_folder(architecture)
    lora = make_lora(architecture, rank=4, alpha=2)
    other = make_lora(architecture, rank=4, alpha=2, dialect="peft")
    rule = RankRule(threshold=between(twins(lora, model, architecture, score)))
    (_, first), (_, second) = (
        result(lorakit.load_lora(one), lorakit.open_source(base), rule=rule, score=score)
        for one, base in ((lora, model), (other, folder))
    )
    expected, found = scores_of(first), scores_of(second)
    assert found.keys() <= expected.keys()
    assert len(found) > least
    for module, pair in found.items():
        for one, other in zip(pair, expected[module], strict=True):
            assert one == pytest.approx(other, abs=CLOSE), module


@pytest.mark.parametrize("score", SCORES)
def test_larger_weights_make_smaller_scores(sd15: Path, score: str) -> None:
    """A model c times as large lowers what is relative to it by log10 c, and nothing else."""
    lora, tensors, factor = lorakit.load_lora(small(every=3)), tensors_of(sd15), 8.0
    scaled = {k: t.float() * factor for k, t in tensors.items() if t.is_floating_point()}
    rule = RankRule(rank=2)
    (a, first), (b, second) = (
        result(lora, DictSource(model), rule=rule, score=score) for model in (tensors, scaled)
    )
    shift = 0.0 if score.endswith("lora") else -math.log10(factor)
    assert worst_error(dense(a), dense(b)) == 0.0, "a rank keeps the same directions"
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one.score_kept is not None and other.score_kept is not None
        assert other.score_kept == pytest.approx(one.score_kept + shift, abs=1e-5)
    threshold = min(cut for _, cut in scores_of(first).values() if cut is not None) - 1e-6
    for rule in (RankRule(size=20_000), RankRule(threshold=threshold)):
        moved = rule if rule.size else RankRule(threshold=threshold + shift)
        ranks = [
            [row.rank_after for row in result(lora, DictSource(model), rule=r, score=score)[1].rows]
            for model, r in ((tensors, rule), (scaled, moved))
        ]
        assert ranks[0] == ranks[1]


@pytest.mark.parametrize("score", SCORES)
def test_rescale_moves_every_score_and_the_change(sd15: Path, score: str) -> None:
    """Also those that are relative to the LoRA: these count its norms as they were before."""
    lora, base = lorakit.load_lora(small(every=3)), lorakit.open_source(sd15)
    rule = RankRule(rank=2)
    (a, first), (b, second) = (
        result(lora, base, rule=rule, score=score, rescale=factor) for factor in (1.0, 0.7)
    )
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one.score_cut is not None and other.score_cut is not None
        assert other.score_cut == pytest.approx(one.score_cut + math.log10(0.7), abs=1e-5)
    assert worst_error(dense(b), {m: 0.7 * delta for m, delta in dense(a).items()}) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.id)
def test_every_architecture_is_measured_fused_or_in_parts(architecture: Architecture) -> None:
    """A fused layer has the norm of its parts together; resize_lora knows SDXL alone."""
    model = layouts.tiny_model(ends(architecture))
    for dialect in ("kohya", "diffusers"):
        lora = lorakit.load_lora(lora_file(architecture, dialect, model))
        for source in (layouts.as_folder(model), layouts.as_single_file(architecture, model)):
            (found,) = yardsticks([lora], score="fro-ckpt", against=DictSource(source))
            assert found.references.keys() == lora.adapters.keys()
            for module, reference_of in found.references.items():
                parts = architecture.fused.get(module, ((module, None),))
                sizes = [float(model[f"{part}.weight"].double().norm()) for part, _ in parts]
                assert float(reference_of) == pytest.approx(
                    math.log10(math.hypot(*sizes)), abs=1e-6
                )


# Several LoRAs


class Counting:
    """A source that counts how often each tensor is read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.inner = DictSource(tensors)
        self.name, self.specs, self.metadata = "counting", self.inner.specs, self.inner.metadata
        self.reads: Counter[str] = Counter()

    def get(self, key: str) -> Tensor:
        self.reads[key] += 1
        return self.inner.get(key)

    def extent(self, key: str) -> None:
        return None


@pytest.mark.parametrize("score", ["fro-ckpt", "spn-ckpt,subspace"])
def test_several_loras_read_each_tensor_once(sdxl: Path, score: str) -> None:
    """q, k and v of the second text encoder lie in one tensor, which is read once too."""
    whole = "lora_te2_text_model_encoder_layers_0_"
    loras = [
        lorakit.load_lora(few(file) | {k: t for k, t in file.items() if k.startswith(whole)})
        for file in (small("sdxl"), small("sdxl", seed=1, dialect="peft"))
    ]
    source = Counting(tensors_of(sdxl))
    shared = yardsticks(loras, score=score, against=source)
    assert set(source.reads.values()) == {1}
    rule = RankRule(threshold=-2.4)
    for lora, yardstick in zip(loras, shared, strict=True):
        source.reads.clear()
        with_shared, _ = resize(lora, rule=rule, against=source, score=yardstick)
        assert not source.reads
        if lora is not loras[1]:
            continue
        alone, _ = resize(lora, rule=rule, against=source, score=score)
        assert set(source.reads.values()) == {1}
        assert worst_error(dense(with_shared), dense(alone)) == 0.0


def test_where_the_score_needs_no_model_none_is_read(sd15: Path, sd15_lora: Path) -> None:
    source = Counting(tensors_of(sd15))
    lora = lorakit.load_lora(sd15_lora)
    resize(lora, rule=RankRule(threshold=-0.3), against=source, score="spn-lora=2,fro-lora=1")
    resize(lora, rule=RankRule(rank=2), against=source)
    resize(lora, rule=RankRule(energy=0.9), against=source)
    assert not source.reads


def test_bytes_do_not_hang_on_threads_memory_or_company(
    sd15: Path, make_lora: Callable[..., Path], tmp_path: Path
) -> None:
    loras = [make_lora("sd1", rank=4, alpha=2, seed=seed, every=3) for seed in (0, 5)]
    how = ["--against", sd15, "--score", BLEND, "--size", "30K", "--overwrite"]
    ran("resize", *loras, *how, "-o", tmp_path / "one")
    ran("resize", *loras[::-1], *how, "-o", tmp_path / "two", "--threads", 1, "--memory", "1M")
    for lora in loras:
        ran("resize", lora, *how, "-o", tmp_path / lora.name, "--threads", 3)
        alone = (tmp_path / lora.name).read_bytes()
        assert all(
            bool((tmp_path / name / lora.name).read_bytes() == alone) for name in ("one", "two")
        )


# Layers that the model lacks, or has otherwise


def test_a_layer_that_the_model_lacks_is_named(sd15: Path) -> None:
    tensors = {k: t for k, t in tensors_of(sd15).items() if not k.startswith("cond_stage_model.")}
    base, lora = DictSource(tensors), lorakit.load_lora(small())
    with pytest.raises(UnmatchedError, match=r"text_encoder\.text_model.*--allow-unmatched"):
        result(lora, base)
    whole, plain = lorakit.open_source(sd15), RankRule(threshold=-2.4, rank=3)
    _, expected = result(lora, whole, rule=plain)
    _, report = result(lora, base, rule=plain, allow_unmatched=True)
    ranks = {row.module: row.rank_after for row in expected.rows}
    for row in report.rows:
        absent = row.module.startswith("text_encoder.")
        assert row.rank_after == (3 if absent else ranks[row.module])
        assert (row.score_kept is None) >= absent
    assert any("have no score" in note and "by --rank alone" in note for note in report.notes)
    sized, report = result(lora, base, rule=RankRule(size=60_000), allow_unmatched=True)
    alive = [m for m in sized.adapters if m.startswith("text_encoder.")]
    assert 0 < len(alive) < len(sized.adapters)
    assert any("mean of the other layers" in note for note in report.notes)


def test_another_model_is_refused(sd15: Path, sdxl: Path) -> None:
    lora = lorakit.load_lora(small())
    with pytest.raises(AdapterError, match="expected a model for"):
        result(lora, lorakit.open_source(sdxl))
    shrunk = {
        key: tensor[:, :10].contiguous() if "to_q" in key else tensor
        for key, tensor in tensors_of(sd15).items()
    }
    with pytest.raises(AdapterError, match="to_q expected a change of"):
        result(lora, DictSource(shrunk))


def test_an_inpainting_model_is_measured_by_the_inputs_that_the_lora_knows(sd15: Path) -> None:
    tensors = tensors_of(sd15)
    first = "model.diffusion_model.input_blocks.0.0.weight"
    mask = 100 * torch.ones(tensors[first].shape[0], 5, 3, 3, dtype=torch.float16)
    grown = {**tensors, first: torch.cat([tensors[first], mask], dim=1)}
    rows, columns = tensors[first].shape[:2]
    g = torch.Generator().manual_seed(0)
    lora = lorakit.load_lora(
        {
            "lora_unet_conv_in.lora_up.weight": torch.randn(rows, 4, 1, 1, generator=g),
            "lora_unet_conv_in.lora_down.weight": torch.randn(4, columns, 3, 3, generator=g),
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(40, 1, 1, 1),
            "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(1, 40, 1, 1),
        }
    )
    for score in ("fro-ckpt", "spn-ckpt", "subspace"):
        (a, one), (b, other) = (
            result(lora, DictSource(model), rule=RankRule(rank=2), score=score)
            for model in (tensors, grown)
        )
        for first_score, second_score in zip(one.rows, other.rows, strict=True):
            assert first_score.score_cut == pytest.approx(second_score.score_cut, abs=1e-6)
        assert worst_error(dense(a), dense(b)) == 0.0


def test_a_layer_of_zeros_keeps_all_and_one_of_nan_is_refused(sd15: Path) -> None:
    lora = lorakit.load_lora(small())
    zero = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    tensors = tensors_of(sd15)
    for score in ("fro-ckpt", "spn-ckpt", "subspace"):
        model = {**tensors, key: torch.zeros_like(tensors[key])}
        _, report = result(lora, DictSource(model), rule=RankRule(threshold=20.0), score=score)
        assert {row.module for row in report.rows if row.rank_after} == {zero}
        assert any(zero in note for note in report.notes)
        broken = {**tensors, key: torch.full_like(tensors[key], math.nan)}
        with pytest.raises(NumericsError, match=r"attn1\.to_q holds NaN"):
            result(lora, DictSource(broken), score=score)


# Every kind of adapter


def test_a_dora_is_scored_by_what_it_changes(sd15: Path, sd15_tuned: Path) -> None:
    """resize_lora carries its magnitudes over to a LoRA that they do not fit."""
    base = lorakit.open_source(sd15)
    dora, _ = lorakit.extract(
        base,
        lorakit.open_source(sd15_tuned),
        rule=RankRule(rank=2),
        choice=lorakit.Choice(kind="dora", convs=False, only=("MID", "OUT03")),
    )
    assert {adapter.kind for adapter in dora.adapters.values()} == {"dora"}
    weights = weights_of(sd15, "sd1")
    exact = {m: a.change(weights[m].float()).double() for m, a in dora.adapters.items()}
    logs = {
        m: (torch.linalg.svdvals(delta) / weights[m].norm()).log10() for m, delta in exact.items()
    }
    threshold = float(torch.stack([found[:6] for found in logs.values()]).median()) + 1e-4
    resized, report = result(dora, base, rule=RankRule(threshold=threshold))
    ranks = {row.module: row.rank_after for row in report.rows}
    assert len(set(ranks.values())) > 2
    for row in report.rows:
        assert row.rank_after == int((logs[row.module] >= threshold).sum())
        if row.rank_after:
            assert row.score_kept == pytest.approx(
                float(logs[row.module][row.rank_after - 1]), abs=CLOSE
            )
    best = {m: reference.best_rank(delta, ranks[m] or 0) for m, delta in exact.items() if ranks[m]}
    assert worst_error(dense(resized), best) < 1e-3


@pytest.mark.parametrize("score", SCORES)
def test_a_loha_is_scored_by_what_it_changes(sd15: Path, score: str) -> None:
    """Its ΔW is made as a whole matrix."""
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
    module = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
    weight = weights_of(sd15, "sd1")[module]
    rows, columns = weight.shape
    g = torch.Generator().manual_seed(3)
    decay = torch.tensor([1.0, 0.5, 0.2])
    parts = {
        "w1_a": torch.randn(rows, 3, generator=g) * decay,
        "w1_b": torch.randn(3, columns, generator=g),
        "w2_a": torch.randn(rows, 3, generator=g) * decay,
        "w2_b": torch.randn(3, columns, generator=g),
    }
    tensors = {f"{stem}.hada_{role}": part for role, part in parts.items()}
    delta = (parts["w1_a"].double() @ parts["w1_b"].double()) * (
        parts["w2_a"].double() @ parts["w2_b"].double()
    )
    twin = Twin(delta, weight, 9, {score: 1.0})
    ordered = twin.ordered
    threshold = float(ordered[3:5].mean())
    lora = lorakit.load_lora(tensors)
    resized, report = result(
        lora, lorakit.open_source(sd15), rule=RankRule(threshold=threshold), score=score
    )
    told(report, {module: twin}, threshold)
    assert worst_error(dense(resized), {module: twin.kept(threshold)}) < 1e-4


# What else resize_lora is known to get wrong


def test_queries_keys_and_values_are_measured_by_their_own_rows(sdxl: Path) -> None:
    """resize_lora names the chunks of the second text encoder k, q, v; they lie as q, k, v."""
    key = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    tensors = tensors_of(sdxl)
    rows = len(tensors[key]) // 3
    sizes = torch.tensor([1.0, 10.0, 100.0]).repeat_interleave(rows).unsqueeze(1)
    model = {**tensors, key: tensors[key].float().sign() * sizes}
    lora = lorakit.load_lora(small("sdxl"))
    (found,) = yardsticks([lora], score="fro-ckpt", against=DictSource(model))
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn"
    logs = [float(found.references[f"{layer}.{name}_proj"]) for name in "qkv"]
    whole = math.log10(math.sqrt(model[key][:rows].numel()))
    assert logs == pytest.approx([whole, whole + 1, whole + 2], abs=1e-5)


def test_neither_alpha_nor_metadata_is_needed_and_what_there_is_stays_true(
    sd15: Path, tmp_path: Path
) -> None:
    bare = {k: t for k, t in small(every=3).items() if not k.endswith(".alpha")}
    plain = synthetic.write_lora(tmp_path / "bare.safetensors", bare)
    full = synthetic.write_lora(
        tmp_path / "full.safetensors", small(every=3), synthetic.lora_metadata("sd1", rank=4)
    )
    how = ["--against", sd15, "--threshold", -2.4]
    ran("resize", plain, full, *how, "-o", tmp_path / "out", "--verify")
    outs = [tmp_path / "out" / name for name in ("bare.safetensors", "full.safetensors")]
    assert worst_error(dense(outs[0]), dense(outs[1])) < FP16
    metadata = metadata_of(outs[1])
    ranks = {adapter.rank for adapter in lorakit.load_lora(outs[1]).adapters.values()}
    assert len(ranks) > 1
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"


def test_a_model_that_was_replaced_is_measured_again(sd15: Path, tmp_path: Path) -> None:
    """resize_lora keeps norms by the checkpoint's path."""
    lora, model = lorakit.load_lora(small()), tmp_path / "model.safetensors"
    synthetic.write_checkpoint(model, synthetic.single_file("sd1", factor=FACTOR))
    _, first = result(lora, lorakit.open_source(model))
    halved = {k: t / 2 if t.is_floating_point() else t for k, t in tensors_of(model).items()}
    synthetic.write_lora(model, halved)
    _, second = result(lora, lorakit.open_source(model))
    assert scores_of(first) != scores_of(second)


# Refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"score": "nuclear"}, "is no score"),
        ({"score": "fro-ckpt,fro_ckpt"}, "there twice"),
        ({"score": "fro-ckpt=-1"}, "weight above 0"),
        ({"score": "fro-ckpt=much"}, "weight above 0"),
        ({"score": "fro-ckpt", "against": None}, "name the model with --against"),
        ({"score": None, "against": None}, "A threshold needs a score"),
        ({"rule": RankRule(energy=0.9)}, "--energy goes by the singular values alone"),
        ({"rule": RankRule(sv_ratio=3.0)}, "--sv-ratio goes by the singular values alone"),
        ({"rule": RankRule()}, "needs a rank rule"),
        ({"rescale": 0.0}, "rescale must be above 0"),
        ({"rescale": math.nan}, "rescale must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(sd15: Path, options: dict[str, object], words: str) -> None:
    chosen = {"against": lorakit.open_source(sd15), "rule": RankRule(threshold=-2.0)}
    with pytest.raises(SpecError, match=words):
        resize(lorakit.load_lora(small()), **{**chosen, "score": "fro-ckpt", **options})  # type: ignore[arg-type]


def test_a_threshold_or_a_size_that_leaves_nothing_says_what_is_there(sd15: Path) -> None:
    lora, base = lorakit.load_lora(small()), lorakit.open_source(sd15)
    with pytest.raises(UnmatchedError, match=r"score of 3, the highest is -\d\.\d+; give a lower"):
        result(lora, base, rule=RankRule(threshold=3.0))
    with pytest.raises(UnmatchedError, match="no room for one direction"):
        result(lora, base, rule=RankRule(size=2_200))


def test_a_threshold_is_for_resize_alone() -> None:
    lora = lorakit.load_lora(small())
    with pytest.raises(LorakitError, match="only resize gives them"):
        lorakit.merge([(lora, 1.0)], rule=RankRule(threshold=-3.0))
