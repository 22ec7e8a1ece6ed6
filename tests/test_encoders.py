"""Each contrastive encoder, by enumeration: stock until something is overridden, its losses exact, bounded and shared."""

from __future__ import annotations

import copy
import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from encoder_cases import Encoder, doubled, encoders, gradients, naive_loss
from encoders_run import SHARES
from safetensors.torch import load_file, save_file
from test_distributed import torchrun
from test_log_probs import Largest
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
from hfcustom.encoders import load_encoder
from hfcustom.losses import chunked, pairs
from hfcustom.losses.pairs import PAIR_LOSSES, find_pair_loss, pair_loss, pair_values
from hfcustom.parts import unwrap
from hfcustom.train import checkpoint_activations

ENCODERS = encoders()
SEAMS = ("vision_features", "text_features", "image_embeddings", "text_embeddings")


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return ENCODERS[request.param]


def step(model: Any, batch: dict[str, torch.Tensor], **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model.train()
    outputs = model(**batch, return_loss=True, **options)
    outputs.loss.backward()
    model.eval()
    return outputs, gradients(model)


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


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", sorted(PAIR_LOSSES))
@pytest.mark.parametrize("size", [16, 2**24])
def test_value_and_gradients_equal_a_loop_over_pairs(
    encoder: Encoder, loss: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", size)
    model, reference = encoder.model(loss=loss).double(), encoder.model(loss=loss).double()
    batch = doubled(encoder.batch())
    found, grads = step(model, batch)
    outputs = reference(**batch)
    bias = 0.0 if reference.logit_bias is None else reference.logit_bias
    expected = naive_loss(loss, outputs.image_embeds, outputs.text_embeds, reference.logit_scale.exp(), bias)
    expected.backward()
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    for name, gradient in gradients(reference).items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_a_sure_model_has_an_exact_loss_in_float32(name: str) -> None:
    """Where logits are large and the loss is small, a difference of large numbers would be rounding alone."""
    torch.manual_seed(0)
    vectors = torch.eye(6)[:, None].repeat(1, 2, 1)
    vectors = nn.functional.normalize(vectors + 0.01 * torch.randn(6, 2, 6), dim=-1)
    bias = None if name == "contrastive" else torch.tensor(-10.0)
    scale = 8.0 if bias is None else 20.0
    found = pair_values(find_pair_loss(name), vectors, vectors, 0, scale, bias)
    exact = pair_values(find_pair_loss(name), *[vectors.double()] * 2, 0, scale, bias)
    assert float(exact.max()) < 5e-3
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def test_similarities_are_built_a_chunk_at_a_time_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs_of_all, width, rows = 512, 8, 32
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", rows * pairs_of_all)
    vectors = torch.randn(pairs_of_all, 2, width, requires_grad=True)
    saved: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    for loss in PAIR_LOSSES.values():
        scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Largest() as largest:
            value = pair_values(loss, vectors, vectors, 0, scale, bias).sum()
        with largest:
            value.backward()
        assert max(saved) <= vectors.numel() < largest.elements == rows * pairs_of_all


def test_training_builds_no_logits_unless_asked(encoder: Encoder) -> None:
    model, batch = encoder.model().train(), encoder.batch()
    assert model(**batch, return_loss=True).logits_per_image is None
    assert model(**batch, return_loss=True, return_logits=True).logits_per_image.shape == (4, 4)
    assert model.eval()(**batch, return_loss=True).logits_per_image.shape == (4, 4)
    assert model(**batch, return_loss=True, return_logits=False).logits_per_image is None


def test_16_bit_vectors_are_compared_in_float32(encoder: Encoder) -> None:
    model, batch = encoder.model(), encoder.batch()
    expected = float(step(model, batch)[0].loss.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = encoder.model().train()(**batch, return_loss=True).loss
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(expected, rel=2e-2)
    model = encoder.model().to(torch.bfloat16)
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    outputs, grads = step(model, batch)
    assert outputs.loss.dtype == torch.float32 and float(outputs.loss.detach()) == pytest.approx(expected, rel=5e-2)
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())


def test_the_scale_is_learned_and_held_at_its_bound(encoder: Encoder) -> None:
    free, bound = encoder.model(), encoder.model(max_logit_scale=5.0)
    _, grads = step(free, encoder.batch())
    assert grads["logit_scale"].abs().sum() > 0
    with torch.no_grad():
        bound.logit_scale.fill_(9.0)
        assert float(bound(**encoder.batch(), return_loss=True).loss) and float(bound.logit_scale) == 9.0
    step(bound, encoder.batch())
    assert float(bound.logit_scale.detach()) == pytest.approx(torch.tensor(5.0).log().item())
    assert float(free.logit_scale.detach()) == pytest.approx(1.7)
    with pytest.raises(ValueError, match="max_logit_scale=0.0 must be above 0"):
        encoder.model_class.config_class(max_logit_scale=0.0)


def test_a_loss_with_a_bias_brings_one_where_stock_has_none(encoder: Encoder, tmp_path: Path) -> None:
    encoder.model(encoder.stock_class).save_pretrained(tmp_path / "stock")
    has = "logit_bias" in dict(encoder.model(encoder.stock_class).named_parameters())
    plain = encoder.model_class.from_pretrained(tmp_path / "stock", loss="contrastive")
    assert (plain.logit_bias is not None) == has
    model = encoder.model_class.from_pretrained(tmp_path / "stock", loss="sigmoid_contrastive")
    assert float(model.logit_bias.detach()) == pytest.approx(-1.1 if has else -10.0)
    _, grads = step(model, encoder.batch())
    assert grads["logit_bias"].abs().sum() > 0
    assert hfcustom.find_parts(model).paths["new"] == (() if has else ("logit_bias",))
    with torch.no_grad():
        model.logit_bias.fill_(-3.0)
    model.save_pretrained(tmp_path / "mine")
    assert float(encoder.model_class.from_pretrained(tmp_path / "mine").logit_bias.detach()) == -3.0


def test_a_users_loss_is_one_function(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "PAIR_LOSSES", dict(PAIR_LOSSES))

    @pair_loss
    def hinge(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
        own = logits.gather(1, positives[:, None])  # (C, 1)
        return (1 + logits - own).clamp(min=0).sum(1) - 1

    outputs, grads = step(encoder.model(loss="hinge"), encoder.batch(), return_logits=True)
    logits = outputs.logits_per_image.detach()
    if encoder.model().logit_bias is not None:
        logits = logits - encoder.model().logit_bias.detach()
    rows = [(1 + side - side.diagonal()[:, None]).clamp(min=0).sum(1) - 1 for side in (logits, logits.t())]
    assert float(outputs.loss.detach()) == pytest.approx(float(torch.stack(rows).mean()), rel=1e-5)
    assert grads
    pair_loss(hinge)  # again is harmless
    with pytest.raises(ValueError, match="'contrastive' belongs to hfcustom.losses.pairs.contrastive"):

        @pair_loss
        def contrastive(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
            return logits


def test_mistakes_name_the_value_and_the_cure(encoder: Encoder, tmp_path: Path) -> None:
    batch = encoder.batch()
    with pytest.raises(
        ValueError, match=r"Unknown loss of a contrastive encoder: 'contrstive'. Did you mean 'contrast"
    ):
        encoder.model(loss="contrstive")(**batch, return_loss=True)
    weighted = encoder.model(loss={"contrastive": 0.5})
    with pytest.raises(ValueError, match=r"Unknown loss of a contrastive encoder: \{'contrastive': 0.5\}"):
        weighted(**batch, return_loss=True)
    encoder.model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unknown loss of a contrastive encoder: 'sigmoid'"):
        encoder.model_class.from_pretrained(tmp_path, loss="sigmoid")
    with pytest.raises(ValueError, match="4 images and 3 texts; with return_loss=True text i is"):
        encoder.model()(batch["input_ids"][:3], batch["pixel_values"], return_loss=True)
    with pytest.raises(ValueError, match="connector='average_pool': this family takes none: an image becomes one"):
        encoder.model(connector="average_pool")
    with pytest.raises(ValueError, match="Unknown encoder 'clipp'. Did you mean 'clip'"):
        load_encoder("clipp")


def test_the_formulas_of_the_documentation_are_right() -> None:
    assert doctest.testmod(pairs).failed == 0 < doctest.testmod(pairs).attempted


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


# ---- two processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("encoders")
    torchrun(folder, "encoders_run.py")
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("loss", sorted(PAIR_LOSSES))
@pytest.mark.parametrize("case", SHARES)
def test_loss_and_gradients_of_two_processes_are_those_of_one(
    ranks: list[dict[str, Any]], encoder: Encoder, loss: str, case: str
) -> None:
    first, second = (dict(rank[f"{encoder.name} {loss} {case}"]) for rank in ranks)
    outputs, expected = step(encoder.model(loss=loss), encoder.batch(range(8)))
    found = (first.pop("loss") + second.pop("loss")) / 2
    torch.testing.assert_close(found, outputs.loss.detach(), rtol=1e-5, atol=0)
    assert first.keys() == second.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name]), name
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        assert float((first[name] - gradient).abs().max()) <= 1e-4 * scale, name


def test_negatives_of_one_process_alone_would_be_another_loss(ranks: list[dict[str, Any]]) -> None:
    clip = ENCODERS["clip"]
    for rank, share in zip(ranks, SHARES["equal"], strict=True):
        with torch.no_grad():
            alone = clip.model()(**clip.batch(share), return_loss=True).loss
        torch.testing.assert_close(rank["eval"]["loss"], alone)
        assert abs(float(rank["clip contrastive equal"]["loss"]) / float(alone) - 1) > 0.1


def test_gathered_rows_stand_in_order_and_get_everyones_gradients(ranks: list[dict[str, Any]]) -> None:
    weights = 3 * torch.arange(6.0).view(3, 2)  # 1 times on the first process, 2 times on the second
    for rank, rows in zip(ranks, (slice(0, 0), slice(0, 3)), strict=True):
        assert rank["gather"]["everyone"].tolist() == [[1, 1]] * 3
        assert int(rank["gather"]["start"]) == 0
        assert torch.equal(rank["gather"]["gradient"], weights[rows])
