"""Each family, by enumeration: the custom class is its stock parent until something is overridden, and loads and saves whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import Family, assert_compiles, assert_same_model, chat_row, picture
from conversations import end_of_turn, labelled
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from hfcustom.data.collate import Collator
from hfcustom.data.messages import read_row
from hfcustom.train import checkpoint_activations

BATCHES = {"one image": [1], "interleaved": [3, 2, 1], "text only": [0, 0]}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    model.eval()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("images", BATCHES.values(), ids=BATCHES)
def test_without_overrides_logits_are_bit_equal_to_stock(family: Family, images: list[int]) -> None:
    batch = family.batch(images)
    custom, stock = family.model(), family.model(family.stock_class)
    with torch.no_grad():
        assert torch.equal(custom(**batch).logits, stock(**batch).logits)


@pytest.mark.parametrize("images", BATCHES.values(), ids=BATCHES)
def test_stock_loss_and_every_gradient_are_bit_equal(family: Family, images: list[int]) -> None:
    batch = family.batch(images)
    loss, grads = step(family.model(loss="stock"), batch)
    stock_loss, stock_grads = step(family.model(family.stock_class), batch)
    assert torch.equal(loss, stock_loss)
    assert grads.keys() == stock_grads.keys()
    assert all(torch.equal(grads[name], stock_grads[name]) for name in grads)


@pytest.mark.parametrize("images", BATCHES.values(), ids=BATCHES)
def test_default_loss_and_gradients_equal_stock_to_rounding(family: Family, images: list[int]) -> None:
    batch = family.batch(images)
    loss, grads = step(family.model(), batch)
    stock_loss, stock_grads = step(family.model(family.stock_class), batch)
    torch.testing.assert_close(loss, stock_loss, rtol=1e-6, atol=0)
    assert grads.keys() == stock_grads.keys()
    largest = max(float(grad.abs().max()) for grad in stock_grads.values())
    for name, grad in grads.items():
        size = float(stock_grads[name].abs().max())
        if max(size, float(grad.abs().max())) < 1e-8 * largest:
            continue  # zero but for rounding: a key's bias moves all scores alike
        scale = max(size, 1e-4 * largest)
        assert float((grad - stock_grads[name]).abs().max()) <= 1e-5 * scale, name


def test_training_builds_no_logits_unless_asked(family: Family) -> None:
    batch, model = family.batch([1]), family.model().train()
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: rows.append(out[..., 0].numel()))
    assert model(**batch).logits is None
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    assert max(rows) == supervised < batch["labels"].numel()
    assert model(**batch, return_logits=True).logits.shape[:2] == batch["input_ids"].shape
    assert model.eval()(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_a_batch_equals_its_rows_alone(family: Family) -> None:
    rows = [chat_row(count, seed) for seed, count in enumerate([2, 0, 1])]
    model, collate = family.corrected(), Collator(family.processor)
    together = dict(collate(rows))
    with torch.no_grad():
        logits = model(**together).logits
        for at, row in enumerate(rows):
            alone = dict(collate([row]))
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[at, :length], model(**alone).logits[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
def test_images_of_different_sizes_share_a_batch(family: Family, connector: str | None) -> None:
    processor = copy.deepcopy(family.processor)
    model = family.corrected(connector=connector)
    model.match_processor(processor)
    rows = [chat_row(2, seed=0), chat_row(1, seed=1)]
    for at, size in enumerate([(50, 30), (24, 60), (40, 40)]):
        rows[at // 2]["images"][at % 2] = picture(at, size)
    collate = Collator(processor)
    together = dict(collate(rows))
    with torch.no_grad():
        logits = model(**together).logits
        for at, row in enumerate(rows):
            alone = dict(collate([row]))
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(logits[at, :length], model(**alone).logits[0], rtol=1e-4, atol=2e-6)


def test_a_correction_is_off_by_default_and_says_what_it_corrects(family: Family) -> None:
    batch, plain = family.batch([2, 0, 1]), family.model()
    for field, reason in family.model_class.corrections.items():
        assert getattr(plain.config, field) is False and reason
        with torch.no_grad():
            assert not torch.equal(family.model(**{field: True})(**batch).logits, plain(**batch).logits)


def test_labels_are_the_assistant_turns_and_nothing_else(family: Family) -> None:
    end = end_of_turn(family.processor)
    rows = [chat_row(2, seed=3, turns=3), chat_row(0, seed=4), chat_row(1, seed=5, turns=2)]
    batch = Collator(family.processor)(rows)
    for row, labels in zip(rows, batch["labels"], strict=True):
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert labelled(family.processor, labels) == [answer + end for answer in answers]
    supervised = batch["input_ids"][batch["labels"] != -100]
    assert not torch.isin(supervised, torch.tensor(family.processor.image_token_ids)).any()
    assert not (batch["labels"][batch["attention_mask"] == 0] != -100).any()


# ---- loading and saving ---------------------------------------------------------------------------------------------


def save_stock(family: Family, folder: Any) -> Any:
    """Write a checkpoint as the hub has it: the stock class's own layout and config."""
    stock = family.model(family.stock_class)
    stock.save_pretrained(folder)
    return stock


def test_a_hub_checkpoint_loads_every_tensor(family: Family, tmp_path: Any) -> None:
    stock = save_stock(family, tmp_path)
    custom, info = family.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    expected = stock.state_dict()
    assert custom.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in custom.state_dict().items())


@pytest.mark.parametrize("part", ["vision", "connector", "language", "head"])
def test_a_key_missing_from_the_checkpoint_is_an_error_that_names_it(family: Family, tmp_path: Any, part: str) -> None:
    model = family.model()
    if part not in family.parts:
        assert part not in {model.stock_parts().part_of(name) for name in model.state_dict()}
        return
    if part == "head" and f"{model.stock_parts().paths[part][0]}.weight" in model.all_tied_weights_keys:
        return  # a tied head has no tensor of its own to lose
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if model.stock_parts().part_of(name) == part)
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"no tensor for '{lost}' .{part} of {family.model_class.__name__}"):
        family.model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("original", [False, True], ids=["names in memory", "names of the hub"])
def test_what_is_saved_loads_whole_in_the_custom_class(family: Family, tmp_path: Any, original: bool) -> None:
    model, batch = family.model(), family.batch([2, 1])
    model.save_pretrained(tmp_path, save_original_format=original)
    assert_same_model(family.model_class.from_pretrained(tmp_path), model, batch)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(auto) is family.model_class
    assert_same_model(auto, model, batch)


def test_what_is_saved_loads_whole_in_the_stock_class(family: Family, tmp_path: Any) -> None:
    model, batch = family.model(), family.batch([2, 1])
    model.save_pretrained(tmp_path)
    stock, info = family.stock_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_model(stock, model, batch)


def test_the_processor_reloads_through_auto(family: Family, tmp_path: Any) -> None:
    family.processor.save_pretrained(tmp_path)
    family.module.tiny_config().save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is family.model_class.processor_class
    before, after = family.batch([2, 0, 1]), family.batch([2, 0, 1], again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_copies_keep_their_own_seams(family: Family) -> None:
    class Shifted(family.model_class):  # type: ignore[misc, name-defined]
        shift = 0.0

        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + self.shift

    model, batch = family.model(Shifted), family.batch([1])
    twin = copy.deepcopy(model)
    twin.shift = 1.0
    with torch.no_grad():
        assert not torch.equal(twin(**batch).logits, model(**batch).logits)
        twin.shift = 0.0
        assert torch.equal(twin(**batch).logits, model(**batch).logits)


# ---- the seams ------------------------------------------------------------------------------------------------------


def test_each_transform_sees_its_shape_and_changes_the_logits(family: Family) -> None:
    seen: dict[str, tuple[int, ...]] = {}

    class Vision(family.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            seen["vision"] = tuple(features.shape)
            return features * torch.linspace(0.5, 1.5, features.shape[1])[:, None]

    class Embeddings(family.model_class):  # type: ignore[misc, name-defined]
        def transform_embeddings(self, embeddings: torch.Tensor, image_mask: torch.Tensor) -> torch.Tensor:
            seen["embeddings"], seen["mask"] = tuple(embeddings.shape), tuple(image_mask.shape)
            return embeddings + image_mask[..., None] * 0.1

    class Hidden(family.model_class):  # type: ignore[misc, name-defined]
        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            seen["hidden"] = tuple(hidden_states.shape)
            return hidden_states * 0.5

    batch, stock = family.batch([2, 1]), family.model()
    text = family.batch([0])
    with torch.no_grad():
        for changed in (Vision, Embeddings, Hidden):
            model = family.model(changed)
            assert not torch.equal(model(**batch).logits, stock(**batch).logits), changed.__name__
            same_on_text = torch.equal(model(**text).logits, stock(**text).logits)
            assert same_on_text == (changed is not Hidden), "vision and image-mask changes must leave text alone"
    rows, tokens = batch["input_ids"].shape
    width = stock.config.get_text_config().hidden_size
    assert seen["hidden"] == seen["embeddings"] == (1, text["input_ids"].shape[1], width)
    assert seen["mask"] == (1, text["input_ids"].shape[1])
    crops, patches, vision_width = seen["vision"]
    configs = [
        getattr(stock.config, name) for name in stock.config.sub_configs
    ]  # None for speech, where it is left out
    sizes = [size for config in configs if config is not None for size in vars(config).values()]
    assert crops and patches and vision_width in sizes


def test_a_replaced_projector_keeps_the_seams_around_it(family: Family) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = self.inner(*args, **kwargs)
            if isinstance(output, torch.Tensor):
                return 2 * output
            if isinstance(output, list):
                return [2 * features for features in output]
            output.last_hidden_state = 2 * output.last_hidden_state
            return output

    calls: list[str] = []

    class Watched(family.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            calls.append(type(self).__name__)
            return features

    class Replaced(Watched):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            path = self.stock_parts().paths["connector"][0]
            self.set_submodule(path, Doubled(self.get_submodule(path)))
            self.post_init()

    if "connector" not in family.parts:
        return
    batch = family.batch([2, 1])
    with torch.no_grad():
        assert not torch.equal(family.model(Replaced)(**batch).logits, family.model(Watched)(**batch).logits)
    assert calls.count("Replaced") == calls.count("Watched") > 0


@pytest.mark.parametrize("part", ["connector", "language"])
def test_a_part_replaced_on_a_finished_model_gets_its_seams(family: Family, part: str) -> None:
    calls: list[str] = []

    class Watched(family.model_class):  # type: ignore[misc, name-defined]
        def transform_vision_features(self, features: torch.Tensor) -> torch.Tensor:
            calls.append("connector")
            return features

        def transform_hidden_states(self, hidden_states: torch.Tensor) -> torch.Tensor:
            calls.append("language")
            return hidden_states

    if part not in family.parts:
        return
    model, batch = family.model(Watched), family.batch([1])
    with torch.no_grad():
        expected = model(**batch).logits
        before = sorted(calls)
        path = model.stock_parts().paths[part][0]
        module = copy.deepcopy(model.get_submodule(path))
        for inner in module.modules():  # as a module that someone built anew
            inner._forward_hooks.clear()
            inner._forward_pre_hooks.clear()
        model.set_submodule(path, module)
        calls.clear()
        assert torch.equal(model(**batch).logits, expected)
    assert sorted(calls) == before and {"connector", "language"} == set(before)


def test_the_language_model_runs_by_itself_as_in_stock(family: Family) -> None:
    model, stock = family.model(), family.model(family.stock_class)
    path = model.stock_parts().paths["language"][0]
    ids = torch.arange(5)[None]
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        for inputs in ({"input_ids": ids}, {"inputs_embeds": embeddings}):
            mine, theirs = (net.get_submodule(path)(**inputs).last_hidden_state for net in (model, stock))
            assert torch.equal(mine, theirs)


WRONG_SHAPES = {
    "transform_vision_features": lambda features: features[:, :-1],
    "transform_embeddings": lambda embeddings, image_mask: embeddings[:1],
    "transform_hidden_states": lambda hidden_states: None,
}


@pytest.mark.parametrize("method", WRONG_SHAPES)
def test_a_transform_that_changes_the_shape_is_named(method: str, family: Family) -> None:
    def wrong(self: Any, *tensors: torch.Tensor) -> Any:
        return WRONG_SHAPES[method](*tensors)

    mine = type("Wrong", (family.model_class,), {method: wrong, "__module__": __name__})
    with pytest.raises(ValueError, match=rf"{method} returned .*it must return \(.*the shape it got"):
        family.model(mine)(**family.batch([1, 1]))


@pytest.mark.parametrize("connector", [None, "average_pool"], ids=["stock", "token-reducing"])
def test_generation_with_cache_equals_generation_without(family: Family, connector: str | None) -> None:
    processor = copy.deepcopy(family.processor)
    model = family.model(connector=connector)
    model.match_processor(processor)
    prompt = read_row(chat_row(2, 1), "row").messages[:1]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    inputs = processor(text=[text], images=[chat_row(2, 1)["images"]], return_tensors="pt")
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    options["suppress_tokens"] = [
        model.placeholder_token_id
    ]  # an untrained model may say one, and then lacks an image
    cached, plain = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_a_users_forward_keeps_generate_and_trainer_working(family: Family) -> None:
    import inspect

    class Loud(family.model_class):  # type: ignore[misc, name-defined]
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super().forward(*args, **kwargs)

    model = family.model(Loud)
    stock_inputs = set(inspect.signature(family.stock_class.forward).parameters)
    assert stock_inputs <= set(inspect.signature(Loud.forward).parameters)
    inputs = {name: tensor for name, tensor in family.batch([1]).items() if name != "labels"}
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert Loud.calls == 2


def test_a_mixins_forward_keeps_generate_working(internvl: Family) -> None:
    class Counting:
        calls = 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    class Counted(Counting, internvl.model_class):  # type: ignore[misc, name-defined]
        pass

    inputs = {name: tensor for name, tensor in internvl.batch([1]).items() if name != "labels"}
    internvl.model(Counted).generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert Counted.calls == 2


def test_gradient_checkpointing_changes_no_gradient(family: Family) -> None:
    batch = family.batch([2, 1])
    loss, grads = step(family.model(), batch)
    model = family.model()
    checkpoint_activations(model)
    again, again_grads = step(model, batch)
    assert torch.equal(loss, again)
    assert grads.keys() == again_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(again_grads[name], grad, rtol=1e-5, atol=1e-8)


def test_every_parameter_but_the_named_ones_gets_a_gradient(family: Family) -> None:
    _, grads = step(family.model(), family.batch([3, 2, 1]))
    model = family.model()
    known = tuple(model.unreached())
    assert {name for name, _ in model.named_parameters() if name not in grads} == {
        name for name, _ in model.named_parameters() if name.startswith(known)
    }
    assert all(any(name.startswith(start) for name, _ in model.named_parameters()) for start in known)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    # a bias of keys cancels in the softmax: its gradient is rounding, which may be zero
    assert not [name for name, grad in grads.items() if not grad.any() and not name.endswith("bias")]


def test_compiled_logits_equal_eager(family: Family) -> None:
    inputs = {name: tensor for name, tensor in family.batch([1]).items() if name != "labels"}
    assert_compiles(family.model(), inputs)


def test_a_model_is_compiled_before_its_first_forward(internvl: Family) -> None:
    """With dynamo as it is set, as a user has it."""
    model, inputs = internvl.model(), {name: t for name, t in internvl.batch([1]).items() if name != "labels"}
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(**inputs).logits, model(**inputs).logits)


def test_tuples_come_back_when_asked_for(family: Family) -> None:
    model, batch = family.model(), family.batch([1])
    with torch.no_grad():
        outputs = model(**batch)
        loss, logits, *_ = model(**batch, return_dict=False)
    assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)
    assert outputs[0] is outputs.loss
