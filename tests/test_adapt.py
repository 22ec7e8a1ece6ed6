"""Freezing, LoRA, 8 and 4 bits, merging: what was asked, nothing else, and back again with equal logits."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, assert_same_model, chat_row
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from hfcustom import adapt, freezing
from hfcustom.parts import expert_matrices, find_parts, is_adapter, part_table, unwrap
from hfcustom.train import fit
from hfcustom.train_config import TrainConfig

CONNECTOR = {"name": "perceiver_resampler", "num_queries": 4, "num_heads": 4}


def lora_modules(model: nn.Module) -> set[str]:
    return {name for name, module in unwrap(model).named_modules() if name.endswith(".lora_A")}


def train_a_little(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


# ---- LoRA -----------------------------------------------------------------------------------------------------------


def test_lora_goes_to_every_linear_of_the_language_model_and_nowhere_else(family: Family) -> None:
    model = family.model()
    language = find_parts(model).paths["language"][0]
    expected = {
        f"{name}.lora_A"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name.startswith(language)
    }
    wrapped = adapt.lora(model, rank=2)
    assert lora_modules(wrapped) == expected and expected
    assert {row.part for row in part_table(wrapped) if row.trainable} == {"language"}


@pytest.mark.parametrize("parts", [["vision"], ["connector"], ["vision", "language"]], ids=" and ".join)
def test_lora_goes_where_it_is_told(family: Family, parts: list[str]) -> None:
    model = family.model()
    part_map = find_parts(model)
    with_linears = {part_map.find(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if without := [part for part in parts if part not in with_linears]:  # Chameleon's image encoder is convolutions
        with pytest.raises(ValueError, match=rf"'{without[0]}'.*(this model has|no Linear module for LoRA)"):
            adapt.lora(model, parts, rank=2)
        return
    wrapped = adapt.lora(model, parts, rank=2)
    assert {row.part for row in part_table(wrapped) if row.trainable} == set(parts)


def test_a_scope_that_matches_nothing_is_an_error(internvl: Family) -> None:
    with pytest.raises(ValueError, match=r"Unknown part 'vison'; .*Did you mean 'vision'"):
        adapt.lora(internvl.model(), "vison")
    with pytest.raises(ValueError, match=r"Unknown part 'new'"):
        adapt.lora(internvl.model(), "new")

    class Scaled(internvl.model_class):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.scale = nn.Embedding(1, 4)
            self.post_init()

    with pytest.raises(ValueError, match="new cannot have LoRA and be trained in full at once"):
        adapt.lora(internvl.model(Scaled), "new")
    with pytest.raises(ValueError, match=r"lora\(\) names no part; this model has vision, connector"):
        adapt.lora(internvl.model(), [])
    with pytest.raises(ValueError, match="has an adapter already"):
        adapt.lora(adapt.lora(internvl.model()))
    with pytest.raises(ValueError, match=r"freeze\(\) names no part"):
        freezing.freeze(internvl.model(), [])
    with pytest.raises(ValueError, match="connector cannot have LoRA and be trained in full at once"):
        adapt.lora(internvl.model(), "connector", train="connector")


def test_a_bare_parameter_cannot_ride_with_an_adapter(internvl: Family) -> None:
    class Tempered(internvl.model_class):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.temperature = nn.Parameter(torch.ones(()))
            self.post_init()

    with pytest.raises(ValueError, match=r"'temperature' is a bare Parameter.*wrap it in a small nn.Module"):
        adapt.lora(internvl.model(Tempered))


def test_a_bare_parameter_of_the_stock_class_stays_and_that_is_said(
    family: Family, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("hfcustom"), "propagate", True)
    model = family.model()
    if "connector" not in family.parts:
        return
    bare = set(find_parts(model).paths["connector"]) & {name for name, _ in model.named_parameters()}
    wrapped = adapt.lora(model, train="connector", rank=2)
    said = {line for line in caplog.messages if "is a bare Parameter" in line}
    assert len(said) == len(bare) and all(any(repr(name) in line for line in said) for name in bare)
    parts = find_parts(wrapped)
    for name, parameter in wrapped.named_parameters():
        if parts.part_of(name) == "connector" and "original_module" not in name:
            assert parameter.requires_grad != any(name.endswith(path) for path in bare), name
    freezing.freeze(model := family.model(), ["vision", "language", "head"])  # what the message advises
    assert all(model.get_parameter(name).requires_grad for name in bare)


def test_new_modules_train_save_reload_and_merge_with_the_adapter(family: Family, tmp_path: Path) -> None:
    processor = copy.deepcopy(family.processor)
    base = family.model(connector=CONNECTOR)
    base.match_processor(processor)
    base.save_pretrained(tmp_path / "base")
    batch = family.batch([2, 0, 1], processor)
    model = adapt.lora(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), rank=4)
    assert {row.part for row in part_table(model) if row.trainable} == {"language", "new"}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = train_a_little(model, batch)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
    assert moved == set(before)
    with torch.no_grad():
        trained = model(**batch).logits
        model.save_pretrained(tmp_path / "adapter")
        fresh = PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        ).eval()
        torch.testing.assert_close(fresh(**batch).logits, trained, rtol=1e-5, atol=1e-6)
        merged = adapt.merge_adapter(tmp_path / "adapter", tmp_path / "base").eval()
        assert type(merged) is family.model_class
        torch.testing.assert_close(merged(**batch).logits, trained, rtol=1e-4, atol=5e-6)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_model(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), merged, batch)


def test_lora_on_experts_trains_reloads_and_merges(family: Family, tmp_path: Path) -> None:
    base, batch = family.model(), family.batch([1, 0])
    stacked = [name for name, _ in expert_matrices(base)]
    if not stacked:
        with pytest.raises(
            ValueError, match="experts=True, but language of this Custom.* holds no experts as stacked"
        ):
            adapt.lora(base, experts=True)
        return
    base.save_pretrained(tmp_path / "base")
    model = adapt.lora(AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), rank=2, experts=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train_a_little(model, batch)
    moved = [name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])]
    assert len([name for name in moved if ".experts." in name and "lora_B" in name]) >= len(stacked)
    assert {row.kind for row in adapt.linear_table(model)} >= {"Linear", "3-D Parameter, not a Linear: stays float32"}
    with torch.no_grad():
        trained = model(**batch).logits
        model.save_pretrained(tmp_path / "adapter")
        again = adapt.load_adapter(tmp_path / "adapter", tmp_path / "base")
        torch.testing.assert_close(again(**batch).logits, trained, rtol=1e-5, atol=1e-6)
        merged = adapt.merge_adapter(tmp_path / "adapter", tmp_path / "base").eval()
        torch.testing.assert_close(merged(**batch).logits, trained, rtol=1e-4, atol=5e-6)
    assert merged.state_dict().keys() == base.state_dict().keys()


def test_an_adapter_trained_by_fit_brings_its_class_along(internvl: Family, tmp_path: Path) -> None:
    """The base is a stock checkpoint; class, connector and loss are those of the training."""
    internvl.model(internvl.stock_class).save_pretrained(tmp_path / "stock")
    base = internvl.model_class.from_pretrained(tmp_path / "stock", connector=CONNECTOR, loss="focal")
    processor = base.match_processor(copy.deepcopy(internvl.processor))
    model = adapt.lora(base, rank=2)
    config = TrainConfig(output_dir=str(tmp_path / "out"), max_steps=2, batch_size=2, lr=1e-2)
    folder = fit(model, processor, [chat_row(1, 0), chat_row(2, 1)], config).model_dir
    batch = internvl.batch([1, 2], processor)
    with torch.no_grad():
        trained = model.eval()(**batch).logits
        loaded = adapt.load_adapter(folder, tmp_path / "stock")
        torch.testing.assert_close(loaded(**batch).logits, trained, rtol=1e-5, atol=1e-6)
    further = adapt.load_adapter(folder, tmp_path / "stock", trainable=True)
    assert {row.part for row in part_table(further) if row.trainable} == {"language", "new"}
    more = fit(
        further, processor, [chat_row(1, 0), chat_row(2, 1)], replace(config, output_dir=str(tmp_path / "more"))
    )
    assert more.step == 2
    merged = adapt.merge_adapter(folder, tmp_path / "stock")
    assert type(merged) is internvl.model_class
    assert (merged.config.connector, merged.config.loss) == (CONNECTOR, "focal")


def test_an_adapter_for_another_class_is_an_error(internvl: Family, tmp_path: Path) -> None:
    internvl.model(internvl.stock_class).save_pretrained(tmp_path / "stock")
    base = internvl.model_class.from_pretrained(tmp_path / "stock", connector=CONNECTOR)
    base.save_pretrained(tmp_path / "base")
    adapt.lora(base, rank=2).save_pretrained(tmp_path / "adapter")  # without fit: no config.json beside it
    with pytest.raises(ValueError, match=r"holds the module 'custom_connector', which InternVLFor.*model_class="):
        adapt.merge_adapter(tmp_path / "adapter", tmp_path / "stock")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit CustomInternVL.*missing adapter keys.*lora_B"):
        adapt.load_adapter(tmp_path / "adapter", tmp_path / "base")


def test_seams_stay_in_effect_under_an_adapter(family: Family) -> None:
    """peft calls forward() of the model that it wraps, not the model."""
    calls: list[str] = []

    class Seen(family.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            calls.append("vision")
            return features

        def transform_embeddings(self, embeddings: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
            calls.append(f"{int(image_mask.any())} embeddings")
            return embeddings

    train = "connector" if "connector" in family.parts else ()
    model = adapt.lora(family.model(Seen, connector="average_pool"), train=train, rank=2)
    processor = copy.deepcopy(family.processor)
    unwrap(model).match_processor(processor)
    batch = family.batch([1], processor)
    model.train()(**batch).loss.backward()
    seen = list(calls)
    assert list(dict.fromkeys(seen)) == ["vision", "1 embeddings"]  # vision once a view, where views differ in length
    with torch.no_grad():
        model.eval()(**{name: value for name, value in batch.items() if name != "labels"})
    assert calls == 2 * seen and seen.count("1 embeddings") == 1


def test_merging_into_quantised_weights_is_refused(internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path / "base")
    base = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "base", quantization_config=adapt.quantization_config(tmp_path / "base")
    )
    base.save_pretrained(tmp_path / "quantised")
    adapt.lora(base, rank=2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"quantised is quantised; an adapter is merged into full-precision"):
        adapt.merge_adapter(tmp_path / "adapter", tmp_path / "quantised")
    adapt.merge_adapter(tmp_path / "adapter")  # the base it was trained on, read in full precision


# ---- 8 and 4 bits ---------------------------------------------------------------------------------------------------

KINDS = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}


@pytest.mark.parametrize("bits", KINDS)
def test_only_the_language_models_linears_are_quantised(family: Family, tmp_path: Path, bits: Any) -> None:
    processor = copy.deepcopy(family.processor)
    plain = family.model(connector=CONNECTOR)
    plain.match_processor(processor)
    plain.save_pretrained(tmp_path)
    config = adapt.quantization_config(tmp_path, bits)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config)
    table = adapt.check_quantization(model)
    linears = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    own_kinds = {type(module).__name__ for module in linears if type(module) is not nn.Linear}  # Llama 4's router
    for row in table:
        stays = row.kind.partition(", not a ")[0] in {"3-D Parameter", *own_kinds}
        assert (row.kind == KINDS[bits]) == (row.part == "language" and not stays), row
    assert sum(row.count for row in table if "Parameter" not in row.kind) == len(linears)
    batch = family.batch([2, 1], processor)
    with torch.no_grad():
        error = (model(**batch).logits - plain(**batch).logits).abs().max()
    assert 0 < float(error) < (0.05 if bits == "8bit" else 0.5)


@pytest.mark.parametrize("bits", KINDS)
def test_a_quantised_model_is_saved_and_reloaded_whole(family: Family, tmp_path: Path, bits: Any) -> None:
    family.model().save_pretrained(tmp_path / "base")
    config = adapt.quantization_config(tmp_path / "base", bits)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", quantization_config=config)
    model.save_pretrained(tmp_path / "quantised")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantised")
    assert adapt.check_quantization(again) == adapt.check_quantization(model)
    assert_same_model(again, model, family.batch([1, 0]))


def test_arias_expert_weights_are_shown_as_what_they_are(families: dict[str, Family], tmp_path: Path) -> None:
    family = families["aria"]
    family.model().save_pretrained(tmp_path)
    config = adapt.quantization_config(tmp_path)
    rows = adapt.check_quantization(AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config))
    experts = [row for row in rows if ".experts." in row.name and "shared" not in row.name]
    assert {row.name.rpartition(".")[2] for row in experts} == {"gate_up_proj", "down_proj"}
    assert all(row.kind == "3-D Parameter, not a Linear: stays float32" and row.count == 2 for row in experts)


def test_a_plan_that_did_not_happen_is_an_error(internvl: Family, tmp_path: Path) -> None:
    internvl.model().save_pretrained(tmp_path)

    def load(skip: list[str]) -> Any:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
        return AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config)

    with pytest.raises(RuntimeError, match=r"skip entry 'vision_tower' matched no Linear .*'model.vision_tower"):
        adapt.check_quantization(load(["vision_tower", "lm_head"]))
    with pytest.raises(RuntimeError, match="Nothing was converted to Linear8bitLt"):
        adapt.check_quantization(load(["model", "lm_head"]))
    plain = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(RuntimeError, match="quantised without a skip list.*hfcustom.quantization_config"):
        adapt.check_quantization(AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=plain))
    with pytest.raises(RuntimeError, match="was not loaded with a quantization_config"):
        adapt.check_quantization(internvl.model())
    model = load(["model.vision_tower", "model.multi_modal_projector", "lm_head"])
    model.lm_head.__class__ = type(model.model.language_model.layers[0].mlp.up_proj)
    with pytest.raises(RuntimeError, match="lm_head is a Linear8bitLt, against the skip list"):
        adapt.check_quantization(model)
    with pytest.raises(ValueError, match="bits='16bit'; choose 8bit or 4bit"):
        adapt.quantization_config(tmp_path, "16bit")  # type: ignore[arg-type]


def test_a_stock_checkpoint_is_planned_for_the_class_that_will_load_it(internvl: Family, tmp_path: Path) -> None:
    internvl.model(internvl.stock_class).save_pretrained(tmp_path)
    config = adapt.quantization_config(tmp_path, model_class=internvl.model_class)
    model = internvl.model_class.from_pretrained(tmp_path, quantization_config=config)
    assert {row.part for row in adapt.check_quantization(model) if row.kind == "Linear8bitLt"} == {"language"}


@pytest.mark.parametrize("bits", KINDS)
def test_lora_on_a_quantised_base_learns(family: Family, tmp_path: Path, bits: Any) -> None:
    family.model().save_pretrained(tmp_path)
    config = adapt.quantization_config(tmp_path, bits)
    model = adapt.lora(AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config), rank=4)
    batch = family.batch([1, 0])
    with (
        torch.no_grad()
    ):  # on a CPU with AVX512-BF16 bitsandbytes would rewrite 4-bit weights here, for eval passes only
        model.eval()(**batch)
    losses = train_a_little(model, batch, steps=4)
    assert losses[-1] < losses[0]
    adapt.check_quantization(model)


# ---- ranks, rsLoRA, DoRA --------------------------------------------------------------------------------------------


def test_each_part_has_its_rank_and_alpha(family: Family) -> None:
    parts = [part for part in ("language", "vision", "connector") if has_linear(family, part)]
    ranks, alphas = ({part: first + at for at, part in enumerate(parts)} for first in (2, 20))
    wrapped = adapt.lora(family.model(), parts, rank=ranks, alpha=alphas)
    part_map, seen = find_parts(wrapped), set()
    for name, module in unwrap(wrapped).named_modules():
        if is_adapter(module):
            part = part_map.part_of(name)
            assert (module.r["default"], module.lora_alpha["default"]) == (ranks[part], alphas[part]), name
            assert module.scaling["default"] == alphas[part] / ranks[part]
            seen.add(part)
    assert seen == set(parts)


def test_experts_have_the_rank_of_their_part(families: dict[str, Family]) -> None:
    ranks = {"connector": 3, "language": 2}
    wrapped = adapt.lora(families["aria"].model(), ranks.keys(), rank=ranks, experts=True)
    adapters = [(name, m) for name, m in unwrap(wrapped).named_modules() if is_adapter(m)]
    part_map = find_parts(wrapped)
    assert {(part_map.part_of(name), m.r["default"]) for name, m in adapters} == {("connector", 3), ("language", 2)}


def has_linear(family: Family, part: str) -> bool:
    model = family.model()
    part_map = find_parts(model)
    return any(isinstance(m, nn.Linear) and part_map.find(name) == part for name, m in model.named_modules())


@pytest.mark.parametrize("kind", ["rslora", "dora"])
def test_other_kinds_of_lora_train_reload_and_merge(internvl: Family, tmp_path: Path, kind: str) -> None:
    model = internvl.model()
    model.save_pretrained(tmp_path / "base")
    wrapped = adapt.lora(model, ["vision", "language"], rank={"vision": 2, "language": 4}, **{kind: True})
    scalings = {m.scaling["default"] for m in unwrap(wrapped).modules() if is_adapter(m)}
    assert scalings == ({4 / 2**0.5, 8 / 4**0.5} if kind == "rslora" else {2.0})
    train_a_little(wrapped, internvl.batch([1, 1]))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = wrapped(**internvl.batch([1])).logits
    merged = adapt.merge_adapter(tmp_path / "adapter", tmp_path / "base")
    assert torch.allclose(merged(**internvl.batch([1])).logits, expected, atol=1e-4)
    assert not torch.allclose(internvl.model()(**internvl.batch([1])).logits, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": {"vision": 2}}, r"rank={'vision': 2} names vision, but vision, language get LoRA"),
        ({"rank": {"vision": 2, "language": 2, "head": 2}}, "names vision, language, head, but vision, language get"),
        ({"alpha": {}}, "alpha={} names no part"),
        ({"rank": 0}, "rank=0 of vision must be a positive whole number"),
        ({"experts": True, "dora": True}, "dora=True and experts=True exclude each other"),
    ],
    ids=lambda value: str(value),
)
def test_ranks_that_fit_no_part(internvl: Family, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt.lora(internvl.model(), ["vision", "language"], **options)


@pytest.mark.parametrize("rank", ["8", 2.5, True, {"language": "8"}])
def test_a_rank_is_a_whole_number(internvl: Family, rank: Any) -> None:
    with pytest.raises(ValueError, match=r"lora\(\) rank=.* of language must be a positive whole number"):
        adapt.lora(internvl.model(), rank=rank)
