"""NanoVLM: images and text in, logits out; the parts are in vision.py, projector.py and language.py.

pixels -> VisionTransformer -> Projector -> put where the text has placeholders -> Decoder -> head. PreTrainedModel adds
saving and loading, GenerationMixin generate(). The shapes are those of nanoVLM (https://github.com/huggingface/nanoVLM) and
of Idefics3 in transformers, with which tests compare the whole; hfcustom/families/nano.py adds the seams and the losses.
Letters: B rows, T tokens, P images of the whole batch, N tokens of an image, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from hfcustom.nano.config import NanoVLMConfig
from hfcustom.nano.language import Decoder
from hfcustom.nano.projector import Projector
from hfcustom.nano.vision import PatchEmbedding, VisionTransformer


class NanoVLMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model; pixel_values (P, C, H, W) are all images of the batch in the order of their placeholders."""

    config_class = NanoVLMConfig
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["VisionBlock", "DecoderBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "decoder.token_embedding.weight"}
    _keys_to_ignore_on_load_unexpected = [r"rotary_embd\.inv_freq"]  # nanoVLM saves them; they follow from the config

    def __init__(self, config: NanoVLMConfig) -> None:
        super().__init__(config)
        if config._attn_implementation != "sdpa":
            raise ValueError(f"attn_implementation={config._attn_implementation!r}; NanoVLM knows 'sdpa' only.")
        config._attn_implementation = "sdpa"  # for the sub-configs
        vision, text = config.vision_config, config.text_config
        self.vision_encoder = VisionTransformer(vision)
        self.projector = Projector(vision.hidden_size, text.hidden_size, config.scale_factor)
        self.decoder = Decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # Linear, Conv2d and Embedding normal, norms 1
        if isinstance(module, PatchEmbedding):
            nn.init.normal_(module.position_embedding, std=self.config.text_config.initializer_range)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.decoder.token_embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding."""
        self.decoder.token_embedding = value

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Return the tower's patches, and the image tokens made of them: (P, C, H, W) -> (P, N, D)."""
        patches = self.vision_encoder(pixel_values)  # (P, patches, D_vision)
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=self.projector(patches))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # (B, T)
        attention_mask: torch.Tensor | None = None,  # (B, S)
        position_ids: torch.Tensor | None = None,  # (B, T)
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,  # (B, T, D)
        pixel_values: torch.Tensor | None = None,  # (P, C, H, W)
        mm_encoder_outputs: Any = None,  # what get_image_features made of them for generate(), which deals it to its beams
        labels: torch.Tensor | None = None,  # (B, T), -100 where nothing is to be learned
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,  # the last so many, or these; 0 is all
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model; kwargs go to the loss function."""
        if asked := [name for name, value in kwargs.items() if name.startswith("output_") and value]:
            raise ValueError(f"{', '.join(asked)}: NanoVLM does not record it; a forward hook on a block shows it.")
        embeddings = self.decoder.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, D)
        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None:
            images = self.get_image_features(pixel_values)
        if images is not None:
            embeddings = self.merge(images.pooler_output, input_ids, embeddings)
        if past_key_values is None and (self.config.text_config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        outputs = self.decoder(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])  # (B, T or fewer, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def merge(self, tokens: torch.Tensor, input_ids: torch.Tensor | None, embeddings: torch.Tensor) -> torch.Tensor:
        """Put image tokens (P, N, D) where the placeholders are, in reading order: (B, T, D) -> (B, T, D)."""
        placeholder = self.config.image_token_id
        if input_ids is not None:
            mask = input_ids == placeholder  # (B, T)
        else:
            vector = self.decoder.token_embedding(torch.tensor(placeholder, device=embeddings.device))  # (D,)
            mask = (embeddings == vector).all(-1)  # (B, T)
        images, each = tokens.shape[:2]
        if not torch.compiler.is_compiling() and int(mask.sum()) != images * each:
            raise ValueError(
                f"The text has {int(mask.sum())} image placeholders (id {placeholder}), but {images} images make "
                f"{images * each} tokens: the processor has to write {each} for each image."
            )
        return embeddings.masked_scatter(mask[..., None], tokens.to(embeddings.dtype))
