"""A part that is to be trained and gets no gradient stops the run at its first step, or at its third."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Family, chat_row
from kinds import family_of_each_kind  # noqa: F401
from torch import nn
from training import train, uneven_rows, user_losses

import hfcustom
from hfcustom.parts import find_parts
from hfcustom.training import coverage


def test_healthy_training_is_not_stopped_and_soon_not_looked_at(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    has_gradient = coverage._has_gradient
    monkeypatch.setattr(coverage, "_has_gradient", lambda p: looked.append(1) or has_gradient(p))
    train(family.model(), family, tmp_path, uneven_rows())
    assert 0 < len(looked) <= 2 * len(find_parts(family.model()).present()) + 200


def test_lora_starts_with_zeros_in_half_of_its_matrices(internvl: Family, tmp_path: Path) -> None:
    torch.manual_seed(0)
    train(hfcustom.lora(internvl.model(), ["vision", "language"], rank=2), internvl, tmp_path, uneven_rows())


def detached(base: Any) -> Any:
    @hfcustom.register
    class Detached(base):
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            return features.detach()

    return Detached


def gated(base: Any, learns: bool) -> Any:
    @hfcustom.register(model_type=f"gated_{learns}".lower())
    class Gated(base):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.gate = nn.Linear(1, 1, bias=False)
            nn.init.zeros_(self.gate.weight)
            self.gate.requires_grad_(learns)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if getattr(self, "gate", None) is not module:
                super()._init_weights(module)

        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            return features * self.gate(features.new_ones(1)).to(features.dtype)

    return Gated


def test_what_is_detached_is_an_error(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model(detached(internvl.model_class))
    message = r"The part 'vision' is to be trained \(\d+ tensors, model.vision_tower\..* first\) and was run, but has "
    with pytest.raises(ValueError, match=message):
        train(model, internvl, tmp_path, uneven_rows())
    frozen = internvl.model(detached(internvl.model_class))
    hfcustom.freeze(frozen, "vision")
    train(frozen, internvl, tmp_path / "frozen", uneven_rows())


def test_what_is_multiplied_by_zero_is_an_error_at_the_third_step(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model(gated(internvl.model_class, learns=False))
    model.gate.requires_grad_(False)
    with pytest.raises(ValueError, match="'vision' .* a gradient of 0 in each of 3 steps: .* multiplied by zero"):
        train(model, internvl, tmp_path, uneven_rows())


def test_a_gate_that_opens_from_zero_is_none(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model(gated(internvl.model_class, learns=True))
    train(model, internvl, tmp_path, uneven_rows())


def test_a_loss_of_image_features_alone_trains_no_head_and_warns(
    internvl: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with user_losses():
        train(internvl.model(loss="image_size"), internvl, tmp_path, uneven_rows())
    told = [record.getMessage() for record in caplog.records if "has no gradient" in record.getMessage()]
    assert [message.split("'")[1] for message in told] == ["head"]


def test_rows_of_text_say_nothing_about_the_tower(internvl: Family, tmp_path: Path) -> None:
    rows = [{**row, "images": [], "messages": words_only(row["messages"])} for row in uneven_rows()]
    train(internvl.model(detached(internvl.model_class)), internvl, tmp_path, rows)


def test_the_only_part_that_is_trained_is_looked_at_too(
    internvl: Family, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = internvl.model(gated(internvl.model_class, learns=False))
    hfcustom.train_only(model, "vision")
    train(model, internvl, tmp_path, uneven_rows())
    assert "The part 'vision' is to be trained" in caplog.text and "a gradient of 0 in each of 3 steps" in caplog.text
    caplog.clear()
    healthy = internvl.model()
    hfcustom.train_only(healthy, "vision")
    train(healthy, internvl, tmp_path / "healthy", uneven_rows())
    assert "is to be trained" not in caplog.text


class Dropped(nn.Module):
    """An output that is not used, behind one that is."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.spare = inner, nn.Linear(1, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_what_the_backward_pass_never_reaches_is_an_error_at_the_first_step(internvl: Family, tmp_path: Path) -> None:
    model = internvl.model()
    hfcustom.freeze(model, "connector")
    model.model.multi_modal_projector = Dropped(model.model.multi_modal_projector)
    with pytest.raises(ValueError, match=r"The part 'new' .*\(2 tensors, .*spare.weight first.* but has no gradient"):
        train(model, internvl, tmp_path, uneven_rows(), max_steps=1)


def words_only(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept = []
    for message in messages:
        blocks = message["content"]
        text = blocks if isinstance(blocks, str) else " ".join(b["text"] for b in blocks if b["type"] == "text")
        kept.append({**message, "content": text})
    return kept


def test_rows_of_text_alone_teach_no_connector_and_stop_no_run(internvl: Family, tmp_path: Path) -> None:
    """Where only a connector is trained, a micro-batch without images has no gradient; the others count as ever."""
    moved = []
    for rows in ([chat_row(1), chat_row(0, 1)], [chat_row(0, 1), chat_row(1)]):
        model = internvl.model()
        hfcustom.train_only(model, "connector")
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        config = hfcustom.TrainConfig(
            output_dir=str(tmp_path / str(len(moved))), max_steps=1, batch_size=2, micro_batch_size=1, lr=1e-2
        )
        hfcustom.fit(model, internvl.processor, rows, config)
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    assert moved[0] == moved[1] and moved[0] and all("multi_modal_projector" in name for name in moved[0])


def test_a_part_that_cannot_reach_the_loss_is_named(families: dict[str, Family], tmp_path: Path) -> None:
    family = families["chameleon"]  # choosing a code has no gradient
    model = family.model()
    hfcustom.train_only(model, "vision")
    config = hfcustom.TrainConfig(output_dir=str(tmp_path), max_steps=1, batch_size=1, micro_batch_size=1)
    with pytest.raises(
        ValueError, match="Nothing that is trained .vision. has a way to the loss .* Train another part"
    ):
        hfcustom.fit(model, family.processor, [chat_row(1)], config)
