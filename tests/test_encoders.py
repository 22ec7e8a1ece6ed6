"""Each contrastive encoder, by enumeration: stock until something is overridden, its losses exact, bounded and shared."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from encoder_cases import Encoder, doubled, encoders, step
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hfcustom
from hfcustom.dual_encoder import CustomDualEncoder
from hfcustom.parts import unwrap
from hfcustom.train import checkpoint_activations

ENCODERS = encoders()
SEAMS = ("vision_features", "text_features", "image_embeddings", "text_embeddings")


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return ENCODERS[request.param]


def assert_same_model(first: Any, second: Any, batch: dict[str, torch.Tensor]) -> None:
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        found, expected = (model.eval()(**batch).logits_per_image for model in (first, second))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["default", "stock"])
def test_without_overrides_outputs_are_bit_equal_to_stock(encoder: Encoder, loss: str) -> None:
    custom = encoder.model(**({} if loss == "default" else {"loss": loss}))
    stock, batch = encoder.model(encoder.stock_class), encoder.batch()
    with torch.no_grad():
        for options in ({}, {"return_loss": True}, {"return_loss": True, "output_hidden_states": True}):
            mine, theirs = custom(**batch, **options), stock(**batch, **options)
            assert type(mine) is type(theirs) and mine.keys() == theirs.keys()
            for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
                assert torch.equal(mine[name], theirs[name]), name
        assert loss == "default" or torch.equal(mine.loss, theirs.loss)
        first, second = (model(**batch, return_loss=True, return_dict=False) for model in (custom, stock))
        assert type(first) is tuple and torch.equal(first[1], second[1])


def test_stock_loss_and_every_gradient_are_bit_equal(encoder: Encoder) -> None:
    mine, grads = step(encoder.model(loss="stock"), encoder.batch())
    theirs, expected = step(encoder.model(encoder.stock_class), encoder.batch())
    assert torch.equal(mine.loss, theirs.loss)
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[name], expected[name]) for name in grads)


def test_the_default_loss_and_every_gradient_equal_stock_to_rounding(encoder: Encoder) -> None:
    batch = encoder.batch(range(8))
    mine, theirs = (step(model, batch)[0].loss for model in (encoder.model(), encoder.model(encoder.stock_class)))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    _, grads = step(encoder.model().double(), doubled(batch))
    _, expected = step(encoder.model(encoder.stock_class).double(), doubled(batch))
    assert grads.keys() == expected.keys() == {name for name, _ in encoder.model().named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-9, atol=1e-14)


def test_rows_alone_have_the_vectors_they_have_in_a_batch(encoder: Encoder) -> None:
    model = encoder.model()
    with torch.no_grad():
        together = model(**encoder.batch())
        for row in range(4):
            alone = model(**encoder.batch([row]))
            for name in ("image_embeds", "text_embeds"):
                torch.testing.assert_close(alone[name][0], together[name][row], rtol=1e-5, atol=1e-6)


def test_compiled_logits_and_loss_equal_eager(encoder: Encoder) -> None:
    model, batch = encoder.model(), encoder.batch()
    torch._dynamo.reset()
    with torch.no_grad():
        found, expected = (net(**batch, return_loss=True) for net in (torch.compile(model, backend="eager"), model))
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image)


def test_gradient_checkpointing_changes_no_gradient(encoder: Encoder) -> None:
    outputs, grads = step(encoder.model(), encoder.batch())
    model = encoder.model()
    checkpoint_activations(model)
    again, again_grads = step(model, encoder.batch())
    assert torch.equal(outputs.loss, again.loss) and grads.keys() == again_grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(again_grads[name], gradient, rtol=1e-5, atol=1e-7)


# ---- the seams ------------------------------------------------------------------------------------------------------


def overriding(encoder: Encoder, seam: str, function: Any) -> Any:
    return type("Changed", (encoder.model_class,), {f"transform_{seam}": function, "__module__": __name__})


@pytest.mark.parametrize("seam", SEAMS)
def test_each_transform_sees_its_shape_and_changes_its_side(encoder: Encoder, seam: str) -> None:
    seen: list[tuple[int, ...]] = []

    def change(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(tensor.shape))
        return tensor + torch.linspace(0.0, 1.0, tensor.shape[-1])

    model, batch = encoder.model(overriding(encoder, seam, change)), encoder.batch()
    with torch.no_grad():
        changed, plain = model(**batch), encoder.model()(**batch)
    side, other = ("image", "text") if seam in ("vision_features", "image_embeddings") else ("text", "image")
    assert not torch.equal(changed.logits_per_image, plain.logits_per_image)
    assert not torch.equal(changed[f"{side}_embeds"], plain[f"{side}_embeds"])
    assert torch.equal(changed[f"{other}_embeds"], plain[f"{other}_embeds"])
    config = model.config
    widths = {"vision_features": config.vision_config.hidden_size, "text_features": config.text_config.hidden_size}
    expected = (4, widths[seam]) if seam in widths else (4, changed.image_embeds.shape[-1])
    assert (seen[0][0], seen[0][-1]) == expected and len(seen[0]) == (3 if seam in widths else 2)
    before = len(seen)
    model.train()(**batch, return_loss=True).loss.backward()
    getattr(model, f"get_{side}_features")(
        **{name: tensor for name, tensor in batch.items() if (name == "pixel_values") == (side == "image")}
    )
    assert len(seen) == before + 2


@pytest.mark.parametrize("seam", SEAMS)
def test_a_transform_that_changes_the_shape_is_named(encoder: Encoder, seam: str) -> None:
    model = encoder.model(overriding(encoder, seam, lambda self, tensor: tensor[:1]))
    with pytest.raises(ValueError, match=rf"transform_{seam} returned .*it must return \(.*the shape it got"):
        model(**encoder.batch())


@pytest.mark.parametrize("seam", sorted(seam for seam in CustomDualEncoder.lacks if seam.startswith("transform")))
def test_a_seam_that_does_not_exist_is_refused(encoder: Encoder, seam: str) -> None:
    with pytest.raises(TypeError, match=f"Changed overrides {seam}, which this family does not have"):
        overriding(encoder, seam.removeprefix("transform_"), lambda self, tensor: tensor)


def test_copies_keep_their_own_seams(encoder: Encoder) -> None:
    model = encoder.model(overriding(encoder, "image_embeddings", lambda self, tensor: tensor + self.shift))
    model.shift = 0.0
    twin, batch = copy.deepcopy(model), encoder.batch()
    twin.shift = 1.0
    with torch.no_grad():
        assert not torch.equal(twin(**batch).logits_per_image, model(**batch).logits_per_image)
        twin.shift = 0.0
        assert torch.equal(twin(**batch).logits_per_image, model(**batch).logits_per_image)


def test_a_replaced_part_gets_its_seam(encoder: Encoder) -> None:
    model = encoder.model(overriding(encoder, "image_embeddings", lambda self, tensor: -tensor))
    batch = encoder.batch()
    with torch.no_grad():
        expected = model(**batch).logits_per_image
        head = copy.deepcopy(model.get_submodule(model.image_head))
        head._forward_hooks.clear()
        model.set_submodule(model.image_head, head)
        assert torch.equal(model(**batch).logits_per_image, expected)


# ---- loading, saving, adapting --------------------------------------------------------------------------------------


def test_a_hub_checkpoint_loads_every_tensor(encoder: Encoder, tmp_path: Path) -> None:
    stock = encoder.model(encoder.stock_class)
    stock.save_pretrained(tmp_path)
    custom, info = encoder.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    assert_same_model(custom, stock, encoder.batch())


@pytest.mark.parametrize("original", [False, True], ids=["names in memory", "names of the hub"])
def test_what_is_saved_loads_whole_everywhere(encoder: Encoder, tmp_path: Path, original: bool) -> None:
    model, batch = encoder.model(), encoder.batch()
    model.save_pretrained(tmp_path, save_original_format=original)
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        again = auto.from_pretrained(tmp_path)
        assert type(again) is encoder.model_class
        assert_same_model(again, model, batch)
    stock, info = encoder.stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_model(stock, model, batch)


@pytest.mark.parametrize("lost", ["vision_model", "text_model", "logit_scale"])
def test_a_key_missing_from_the_checkpoint_is_an_error_that_names_it(
    encoder: Encoder, tmp_path: Path, lost: str
) -> None:
    encoder.model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.startswith(lost))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no tensor for '{name}' .*of {encoder.model_class.__name__}"):
        encoder.model_class.from_pretrained(tmp_path)


def test_the_processor_reloads_through_auto(encoder: Encoder, tmp_path: Path) -> None:
    encoder.processor.save_pretrained(tmp_path)
    encoder.module.tiny_config().save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is encoder.model_class.processor_class
    before, after = encoder.batch(), Encoder.batch(Reread(encoder.name, encoder.module, again))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Reread(Encoder):
    """An encoder with another processor."""

    def __init__(self, name: str, module: Any, processor: Any) -> None:
        super().__init__(name, module)
        self.__dict__["processor"] = processor


def test_a_subclass_registers_trains_its_modules_and_loads_back(encoder: Encoder, tmp_path: Path) -> None:
    def with_adapter(self: Any, config: Any) -> None:
        encoder.model_class.__init__(self, config)
        width = self.get_submodule(self.text_head).out_features
        self.adapter = nn.Linear(width, width)
        nn.init.eye_(self.adapter.weight)
        self.post_init()

    body = {
        "__init__": with_adapter,
        "transform_image_embeddings": lambda self, vectors: self.adapter(vectors),
        "__module__": __name__,
    }
    mine = type("MyTowersModel", (encoder.model_class,), body)
    with pytest.raises(ValueError, match=r"MyTowersModel is not registered: .*@hfcustom.register"):
        encoder.model(mine).save_pretrained(tmp_path)
    mine = hfcustom.register(mine)
    assert mine.config_class.model_type == "my_towers"
    encoder.model(encoder.stock_class).save_pretrained(tmp_path / "stock")
    model = mine.from_pretrained(tmp_path / "stock")
    assert torch.equal(model.adapter.weight, torch.eye(len(model.adapter.weight)))
    assert hfcustom.find_parts(model).paths["new"] == ("adapter",)
    _, grads = step(model, encoder.batch())
    assert "adapter.weight" in grads
    model.save_pretrained(tmp_path / "mine")
    again = AutoModel.from_pretrained(tmp_path / "mine")
    assert type(again) is mine
    assert_same_model(again, model, encoder.batch())


def test_towers_freeze_and_take_lora_by_part(encoder: Encoder) -> None:
    locked = encoder.model()  # LiT, https://arxiv.org/abs/2111.07991
    hfcustom.freeze(locked, "vision")
    _, grads = step(locked, encoder.batch())
    assert {hfcustom.find_parts(locked).part_of(name) for name in grads} == {"language", "connector"}
    wrapped = hfcustom.lora(encoder.model(), ["vision", "language"], rank=2)
    _, grads = step(wrapped, encoder.batch())
    assert grads and all("lora_" in name for name in grads)
    assert isinstance(unwrap(wrapped), encoder.model_class)
    with torch.no_grad():
        expected = encoder.model()(**encoder.batch()).logits_per_image
        torch.testing.assert_close(wrapped.eval()(**encoder.batch()).logits_per_image, expected)


# ---- native ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_scores_as_stock_does(encoder: Encoder, tmp_path: Path) -> None:
    encoder.model().save_pretrained(tmp_path / "mine")
    encoder.model(encoder.stock_class).save_pretrained(tmp_path / "stock")
    answers = []
    for folder in ("mine", "stock"):
        encoder.processor.save_pretrained(tmp_path / folder)
        classify = pipeline("zero-shot-image-classification", model=str(tmp_path / folder))
        labels = ["a cat", "two dogs", "the number 7"]
        answers.append(classify(picture(3), candidate_labels=labels, hypothesis_template="{}"))
        assert type(classify.model) is (encoder.model_class if folder == "mine" else encoder.stock_class)
    assert answers[0] == answers[1] and len({answer["score"] for answer in answers[0]}) == 3


def test_trainer_takes_the_loss_of_each_batch_and_averages_micro_batches(encoder: Encoder, tmp_path: Path) -> None:
    def collate(rows: list[int]) -> dict[str, Any]:
        return {**encoder.batch(rows), "return_loss": True}

    model = encoder.model()
    with torch.no_grad():
        expected = [float(model(**collate(rows)).loss) for rows in ([0, 1], [2, 3])]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-3,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=list(range(4)))  # type: ignore[arg-type]
    trainer._get_train_sampler = lambda *args: None  # type: ignore[method-assign]  # rows in their order
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[0] == pytest.approx(sum(expected) / 2, rel=1e-4) and logged[-1] < logged[0]


def test_the_signature_is_that_of_stock(encoder: Encoder) -> None:
    stock = inspect.signature(encoder.stock_class.forward).parameters
    mine = inspect.signature(encoder.model_class.forward).parameters
    assert [name for name in mine if name in stock] == list(stock)
