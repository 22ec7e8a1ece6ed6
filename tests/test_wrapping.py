"""wrap(): a model of a stranger's class, as remote code on the hub has it, trains with hfcustom's losses, LoRA and 8 bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
    SiglipVisionModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import hfcustom
from hfcustom import adapt
from hfcustom.families import tiny
from hfcustom.losses import IGNORE
from hfcustom.parts import part_table

IMAGE, VOCABULARY, TOKENS = 7, 97, 4


class ChatConfig(PretrainedConfig):
    """A config as remote code writes it: sub-configs under names of its own, no image token."""

    model_type = "stranger_chat"

    def __init__(self, vision_config: Any = None, llm_config: Any = None, scale: float = 1.0, **kwargs: Any) -> None:
        sizes = {"image_size": 16, "patch_size": 8, "vision_use_head": False}
        vision_config = vision_config or {**tiny.VISION, **sizes}
        llm_config = llm_config or {**tiny.TEXT, "vocab_size": VOCABULARY}
        own = [values if isinstance(values, dict) else values.to_dict() for values in (vision_config, llm_config)]
        self.vision_config = AutoConfig.for_model("siglip_vision_model", **_plain(own[0]))
        self.llm_config = AutoConfig.for_model("qwen2", **_plain(own[1]))
        self.scale = scale
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        return self.llm_config


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("model_type", "transformers_version")}


class StrangerChat(PreTrainedModel, GenerationMixin):
    """A flat class: no inner model, a loss of its own, `loss_function` never asked."""

    config_class = ChatConfig
    _supports_sdpa = True

    def __init__(self, config: ChatConfig) -> None:
        super().__init__(config)
        self.vision_model = SiglipVisionModel(config.vision_config)
        self.mlp1 = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
        self.language_model = Qwen2ForCausalLM(config.llm_config)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        embeds = self.language_model.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.mlp1(self.vision_model(pixel_values).last_hidden_state)
            embeds = embeds.masked_scatter((input_ids == IMAGE)[..., None], features)
        outputs = self.language_model(inputs_embeds=embeds, attention_mask=attention_mask)
        logits = outputs.logits * self.config.scale
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def stranger(**config: Any) -> Any:
    torch.manual_seed(0)
    return StrangerChat(ChatConfig(**config)).eval()


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, VOCABULARY, (rows, 12), generator=generator)
    ids[:, 1 : 1 + TOKENS] = IMAGE
    labels = ids.masked_fill(torch.arange(12) < 8, IGNORE)
    pixels = torch.randn(rows, 3, 16, 16, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}


def test_loss_and_gradients_are_the_strangers_own() -> None:
    theirs, ours, data = stranger().train(), hfcustom.wrap(stranger()).train(), batch()
    expected = theirs(**data).loss
    expected.backward()
    outputs = ours(**data)
    outputs.loss.backward()
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-6, atol=0)
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert grads.keys() == {name for name, p in ours.named_parameters() if p.grad is not None}
    largest = max(float(grad.abs().max()) for grad in grads.values())
    for name, grad in grads.items():
        scale = max(float(grad.abs().max()), 1e-4 * largest)
        assert float((ours.get_parameter(name).grad - grad).abs().max()) <= 1e-5 * scale, name


def test_what_it_computes_without_labels_stays_the_same() -> None:
    inputs = {name: tensor for name, tensor in batch().items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(hfcustom.wrap(stranger())(**inputs).logits, stranger()(**inputs).logits)


def test_the_head_runs_on_supervised_tokens_only() -> None:
    model, data, rows = hfcustom.wrap(stranger()).train(), batch(), []
    model(**data)  # the first batch is compared with the model's own logits
    model.language_model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out[..., 0].numel()))
    model(**data)
    assert max(rows) == int((data["labels"] != IGNORE).sum())


def test_several_losses_by_name() -> None:
    model = hfcustom.wrap(stranger(), loss={"focal": 1.0, "z_loss": 0.01}).train()
    total = model(**batch()).loss
    assert set(model.loss_values) == {"focal", "z_loss"}
    assert float(total) == pytest.approx(sum(float(v.mean) * v.weight for v in model.loss_values.values()), rel=1e-5)


def test_parts_freezing_and_lora_follow_the_graph() -> None:
    model = hfcustom.wrap(stranger())
    assert hfcustom.find_parts(model).paths == {
        "vision": ("vision_model",),
        "connector": ("mlp1",),
        "language": ("language_model",),
        "head": ("language_model.lm_head",),
        "new": (),
        "other": (),
    }
    hfcustom.freeze(model, "vision")
    assert {row.part for row in part_table(model) if not row.trainable} == {"vision"}
    tuned = adapt.lora(hfcustom.wrap(stranger()), "language", rank=2).train()
    tuned(**batch()).loss.backward()
    assert {row.part for row in part_table(tuned) if row.trainable} == {"language"}
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


def test_it_loads_in_8_bits_and_trains(tmp_path: Path) -> None:
    stranger().save_pretrained(tmp_path)
    plan = adapt.quantization_config(tmp_path, model_class=StrangerChat)
    model = hfcustom.wrap(StrangerChat.from_pretrained(tmp_path, quantization_config=plan))
    kinds = {(row.part, row.kind) for row in adapt.linear_table(model)}
    assert ("language", "Linear8bitLt") in kinds and ("vision", "Linear") in kinds and ("head", "Linear") in kinds
    tuned = adapt.lora(model, "language", rank=2).train()
    tuned(**batch()).loss.backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)


def test_what_it_saves_is_its_own_checkpoint(tmp_path: Path) -> None:
    model = hfcustom.wrap(stranger())
    with torch.no_grad():
        model.mlp1[1].weight.add_(1.0)
    model.save_pretrained(tmp_path)
    again = StrangerChat.from_pretrained(tmp_path)
    assert type(again) is StrangerChat
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_logits_that_change_after_the_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"StrangerChat changes its logits after the head .*compute_logits"):
        hfcustom.wrap(stranger(scale=0.5)).train()(**batch())


def test_a_loss_of_images_needs_their_token() -> None:
    spec = {"cross_entropy": 1.0, "contrastive": 1.0}
    with pytest.raises(ValueError, match=r"'contrastive' looks for image tokens.*wrap\(model, image_token_id"):
        hfcustom.wrap(stranger(), loss=spec).train()(**batch())


class OddNames(StrangerChat):
    """As StrangerChat, with names that nobody else uses."""

    def __init__(self, config: ChatConfig) -> None:
        super().__init__(config)
        self.eyes, self.voice = self.vision_model, self.language_model
        del self.vision_model, self.language_model

    def forward(self, **inputs: Any) -> Any:
        return StrangerChat.forward(Renamed(self), **inputs)

    def get_output_embeddings(self) -> nn.Module:
        return self.voice.lm_head


class Renamed:
    """OddNames under the names that StrangerChat.forward uses."""

    def __init__(self, model: Any) -> None:
        self.vision_model, self.language_model, self.mlp1, self.config = (
            model.eyes,
            model.voice,
            model.mlp1,
            model.config,
        )


def test_unusual_names_can_be_told() -> None:
    model = OddNames(ChatConfig()).eval()
    with pytest.raises(ValueError, match=r"no image encoder .*wrap\(model, vision='path.of.encoder'"):
        hfcustom.wrap(model)
    with pytest.raises(ValueError, match=r"vision='eye' is no module of OddNames, which has mlp1, eyes, voice"):
        hfcustom.wrap(model, vision="eye")
    wrapped = hfcustom.wrap(model, vision="eyes", language="voice")
    assert hfcustom.find_parts(wrapped).paths["connector"] == ("mlp1",)
    wrapped.train()(**batch()).loss.backward()
    assert wrapped.mlp1[1].weight.grad is not None


# ---- a class that puts images into the text while it runs, as LLaVA's own code and its descendants do -----------------

MARK = -200  # stands for a whole image


class SplicedModel(Qwen2Model):
    """The decoder, with the tower and the projector among its layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sizes = {**tiny.VISION, "image_size": 16, "patch_size": 8, "vision_use_head": False}
        self.vision_tower = SiglipVisionModel(AutoConfig.for_model("siglip_vision_model", **_plain(sizes)))
        self.mm_projector = nn.Linear(32, 64)


class SplicedChat(Qwen2ForCausalLM):
    """Its forward makes rows longer, labels too."""

    own_loss = True  # cross_entropy written out, on shifted tokens; else transformers' loss_function
    keeps_labels = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = SplicedModel(config)

    def forward(
        self, input_ids: Any = None, images: Any = None, labels: Any = None, return_dict: Any = None, **kwargs: Any
    ) -> Any:
        for name in ("attention_mask", "inputs_embeds"):  # peft passes on what it is not given
            kwargs.pop(name, None)
        features = self.model.mm_projector(self.model.vision_tower(images).last_hidden_state)
        rows, targets = [], []
        for ids, row, image in zip(input_ids, labels if labels is not None else input_ids, features, strict=True):
            at = int((ids == MARK).nonzero())
            embeds = self.model.embed_tokens(ids.clamp(min=0))
            rows.append(torch.cat([embeds[:at], image, embeds[at + 1 :]]))
            targets.append(torch.cat([row[:at], row.new_full((len(image),), IGNORE), row[at + 1 :]]))
        wide = None if labels is None else torch.stack(targets)
        if not self.own_loss:
            return super().forward(inputs_embeds=torch.stack(rows), labels=wide, **kwargs)
        outputs = super().forward(inputs_embeds=torch.stack(rows), **kwargs)
        if wide is not None and not self.keeps_labels:
            flat = outputs.logits[:, :-1].reshape(-1, self.config.vocab_size)
            outputs.loss = nn.functional.cross_entropy(flat, wide[:, 1:].flatten())
        return outputs if return_dict else outputs.to_tuple()


def spliced(**flags: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a tiny model and a batch whose marks stand at different places."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **_plain({**tiny.TEXT, "vocab_size": VOCABULARY}))
    model = type("SplicedChat", (SplicedChat,), flags)(config).eval()
    data = batch()
    data["input_ids"][:, 1 : 1 + TOKENS] = 11
    data["input_ids"][[0, 1], [2, 5]] = MARK
    return model, {"images": data.pop("pixel_values"), **data}


@pytest.mark.parametrize("own_loss", [True, False], ids=["own loss", "transformers' loss"])
def test_images_may_be_spliced_into_the_text(own_loss: bool) -> None:
    (theirs, data), (ours, _) = spliced(own_loss=own_loss), spliced(own_loss=own_loss)
    expected = theirs.train()(**data, return_dict=True).loss
    expected.backward()
    ours = hfcustom.wrap(ours, loss={"cross_entropy": 1.0, "z_loss": 0.0}).train()
    outputs = ours(**data)
    outputs.loss.backward()
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected, rtol=1e-6, atol=0)
    for part in ("model.mm_projector.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"):
        torch.testing.assert_close(
            ours.get_parameter(part).grad, theirs.get_parameter(part).grad, rtol=1e-4, atol=1e-6
        )
    paths = hfcustom.find_parts(ours).paths
    assert paths["vision"] == ("model.vision_tower",) and paths["connector"] == ("model.mm_projector",)
    assert paths["language"] == ("model",)
    with torch.no_grad():
        assert ours.eval()(**data).logits.shape[1] == 12 - 1 + TOKENS


def test_the_reference_of_a_spliced_batch_is_spliced_too() -> None:
    model, data = spliced()
    tuned = hfcustom.lora(hfcustom.wrap(model, loss={"dpo": 1.0}), "language", rank=2).train()
    loss = tuned(**data, preference=torch.tensor([1, -1])).loss
    assert float(loss) == pytest.approx(math.log(2), rel=1e-5)


class Repadded(StrangerChat):
    """Its forward moves padding from the left to the right, as LLaVA's own code does."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        places = (torch.arange(input_ids.shape[1]) + (attention_mask == 0).sum(1, keepdim=True)) % input_ids.shape[1]
        moved = [None if x is None else x.gather(1, places) for x in (input_ids, attention_mask, labels)]
        return super().forward(input_ids=moved[0], attention_mask=moved[1], labels=moved[2], **kwargs)


@pytest.mark.parametrize("model_class", [StrangerChat, Repadded], ids=["stays", "moves"])
def test_padding_on_the_left_may_be_moved(model_class: Any) -> None:
    torch.manual_seed(0)
    model, data = model_class(ChatConfig()).eval(), batch()
    for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE)):
        data[name] = nn.functional.pad(data[name], (3, 0), value=filler)
        data[name][0] = data[name][0].roll(-3)
    data["labels"][0, :2], data["labels"][0, -3:] = IGNORE, 20
    data["attention_mask"][0] = 1
    expected = model(**data).loss
    torch.testing.assert_close(hfcustom.wrap(model)(**data).loss, expected, rtol=1e-5, atol=0)


def test_labels_that_do_not_come_back_are_named_and_modes_stay() -> None:
    model, data = spliced(keeps_labels=True)
    wrapped = hfcustom.wrap(model).train()
    wrapped.model.vision_tower.eval()
    with pytest.raises(
        ValueError, match=r"made \(2, 15\) positions of labels \(2, 12\) and did not hand .* inputs_embeds"
    ):
        wrapped(**data)
    assert wrapped.training and not wrapped.model.vision_tower.training


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="takes a PreTrainedModel, not the Linear"):
        hfcustom.wrap(nn.Linear(1, 1))  # type: ignore[type-var]
    with pytest.raises(TypeError, match="has hfcustom's losses already"):
        hfcustom.wrap(hfcustom.wrap(stranger()))
    model = stranger()
    with pytest.raises(ValueError, match="'focl'. Did you mean 'focal'"):
        hfcustom.wrap(model, loss="focl")
    assert type(model) is StrangerChat
    with pytest.raises(TypeError, match="transform_hidden_states, which this family does not have: wrap"):
        type("Mine", (type(hfcustom.wrap(model)),), {"transform_hidden_states": lambda self, hidden: hidden})
