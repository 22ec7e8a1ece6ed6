"""Nemotron 3 Nano Omni (nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16), a mixture of experts: 3 of 30 B parameters run
for a token.

RADIO ViT of any image size -> pixel shuffle x0.5 -> RMSNorm + two-layer MLP -> Nemotron-H: Mamba-2, attention and MoE layers.
One token for 32 x 32 px, in a video for two frames. Speech is left to stock. Papers: https://arxiv.org/abs/2412.07679 (the tower),
https://arxiv.org/abs/2504.03624 (the language model); stock code: transformers/models/nemotron_h_omni, which keeps all in one
flat class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import NemotronH_Omni_Reasoning_V3, NemotronH_Omni_Reasoning_V3_Config
from transformers import NemotronH_Omni_Reasoning_V3Processor as StockProcessor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.video_utils import VideoMetadata

from hfcustom import patches
from hfcustom.base import CustomVLM
from hfcustom.configuration import CustomConfig
from hfcustom.connectors import Grid, count_tokens_out, reduce_tokens, takes_pictures
from hfcustom.families import tiny
from hfcustom.losses import LossContext
from hfcustom.processors import MatchedProcessor, NeedsTorchvision, check_one_kind
from hfcustom.ragged import RaggedImages
from hfcustom.registry import register
from hfcustom.videos import VideoFrames

REQUIRES = ("torchvision",)


PUBLISHED_TYPE = "NemotronH_Nano_Omni_Reasoning_V3"  # model_type of the hub's config.json, which no Auto class knows


def reads(config: Mapping[str, Any]) -> bool:
    """Whether a config.json with a model_type that no family has is this family's."""
    return config.get("model_type") == PUBLISHED_TYPE


class CustomNemotronH_Omni_Reasoning_V3_Config(CustomConfig, NemotronH_Omni_Reasoning_V3_Config):
    """NemotronH_Omni_Reasoning_V3_Config with `connector` and `loss`."""

    model_type = "custom_nemotron_h_omni"
    tie_word_embeddings: bool = False  # stock has no such field, and ties nothing

    @classmethod
    def kin(cls) -> list[str]:
        """Return the model_types whose config.json this class reads, the published one included."""
        return [*super().kin(), PUBLISHED_TYPE]


class CustomNemotronH_Omni_Reasoning_V3Processor(NeedsTorchvision, MatchedProcessor, StockProcessor):
    """The stock processor; it follows the model's connector and returns text_replacement_offsets, which labels need."""

    _replaced: Any = None  # where the last call wrote image tokens

    def image_grid(self, image_inputs: Mapping[str, Any], image_idx: int) -> Grid:
        """Return the rows and columns of an image's tokens, after the pixel shuffle."""
        merge = round(1 / self.image_processor.downsample_ratio)
        rows, columns = (int(side) // merge for side in image_inputs["image_grid_hw"][image_idx])
        return rows, columns

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return what stock writes for a video, with as many placeholders a frame as the connector makes tokens."""
        metadata = kwargs.get("video_metadata")
        if isinstance(metadata, list):  # as other families take it; stock knows a single one
            kwargs["video_metadata"] = VideoMetadata(**metadata[0]) if isinstance(metadata[0], dict) else metadata[0]
        module = self.connector_module()
        if module is not None:
            cell = self.video_processor.patch_size * round(1 / self.video_processor.downsample_ratio)
            rows, columns = (side // cell for side in video_inputs["pixel_values_videos"].shape[-2:])
            left = count_tokens_out(module, rows * columns, (rows, columns))
            video_inputs = {**video_inputs, "num_tokens": {video_idx: left}}  # stock looks at this one only
        text: str = super().replace_video_token(video_inputs, video_idx, **kwargs)
        return text

    def get_text_with_replacements(self, *args: Any, **kwargs: Any) -> Any:
        """Replace as stock does, and keep where; the stock __call__ drops it."""
        text, self._replaced = super().get_text_with_replacements(*args, **kwargs)
        return text, self._replaced

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> Any:
        """Process as stock does; also return text_replacement_offsets where they are asked for, as other families do."""
        if videos is not None and not isinstance(text, str) and len(text) > 1:
            raise ValueError(
                f"Nemotron takes one row a call where there is a video, not {len(text)}: train with micro_batch_size=1."
            )
        check_one_kind("Nemotron", images, videos)
        asked = {**kwargs, **kwargs.get("text_kwargs", {})}.get("return_text_replacement_offsets")
        outputs = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if asked:
            outputs["text_replacement_offsets"] = self._replaced
        self._replaced = None
        return outputs


class CustomNemotronH_Omni_Reasoning_V3(VideoFrames, RaggedImages, CustomVLM, NemotronH_Omni_Reasoning_V3):
    """Nemotron 3 Nano Omni with five seams; vision features are one image's patches, or a frame's, before the pixel shuffle.

    A frame is what the tower makes one of, `video_temporal_patch_size` pictures. Videos work here, one a call; stock
    (transformers 5.23.0) stops at concatenating what is one tensor.
    """

    config_class = CustomNemotronH_Omni_Reasoning_V3_Config
    processor_class = CustomNemotronH_Omni_Reasoning_V3Processor
    state_modules = (NemotronHMamba2Mixer,)
    _router_logits: Any = None  # of the running forward

    @classmethod
    def merge_images(cls, rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Join the image tensors of rows; stock sees the images or the videos of a call."""
        check_one_kind(
            "Nemotron", *(any(name in row for row in rows) for name in ("pixel_values", "pixel_values_videos"))
        )
        return super().merge_images(rows)

    @property
    def other_modules(self) -> tuple[str, ...]:
        """What is for speech beside its encoder."""
        return () if self.embed_audio is None else ("embed_audio",)

    def unreached(self) -> dict[str, str]:
        """Return what training on images and text never reaches."""
        video = {"vision_model.embeddings.video_patch_projection.": "patches of videos have a projection of their own"}
        return super().unreached() | video

    def get_decoder(self) -> Any:
        """Return the language model without its head; stock returns the two together."""
        return self.language_model.model

    def get_output_embeddings(self) -> nn.Module:
        """Return the head; stock returns None."""
        head: nn.Module = self.language_model.lm_head
        return head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.language_model.lm_head = new_embeddings

    def loss_context(self, batch: Mapping[str, Any], labels: torch.Tensor, return_logits: bool = False) -> LossContext:
        """Return all that a loss may look at; stock drops the router logits that its language model returns."""
        self._router_logits = None
        context = super().loss_context(batch, labels, return_logits)
        context.outputs = MoeCausalLMOutputWithPast(**context.outputs, router_logits=self._router_logits)
        self._router_logits = None
        return context

    def _at_language_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        self._router_logits = getattr(output, "router_logits", None)
        return super()._at_language_output(module, args, output)

    def image_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """Return each image's rows and columns after the pixel shuffle."""
        merge = round(1 / self.config.downsample_ratio)
        return [(rows // merge, columns // merge) for rows, columns in inputs["image_grid_hw"].tolist()]

    @property
    def video_token_id(self) -> int:
        """The id of <image>, which frames are written with too."""
        token: Any = self.config.image_token_id
        return int(token)

    def _video_outputs(self, stock: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.video_pruning_rate > 0:
            raise ValueError(
                f"video_pruning_rate={self.video_pruning_rate}, but stock's pruning does not run (transformers 5.23.0). Load the "
                "model with video_pruning_rate=0.0, and name a connector: temporal_dedup drops what repeats, too."
            )
        outputs = super()._video_outputs(stock, args, kwargs)
        frames = outputs.pooler_output  # (F, N, D)
        if self.custom_connector is not None:
            assert self.video_inputs is not None, "get_video_features is running"
            cell = self.vision_model.patch_size * round(1 / self.config.downsample_ratio)
            rows, columns = (side // cell for side in self.video_inputs["pixel_values_videos"].shape[-2:])
            left = count_tokens_out(self.custom_connector, frames.shape[1], (rows, columns))
            told = self.question_of([left] * len(frames)) | self.pictures_of_tokens(frames)
            frames = reduce_tokens(
                self.custom_connector, frames, (rows, columns), self.config.connector, told
            )  # (F, M, D)
        outputs.pooler_output = tuple(frames)  # forward() concatenates it
        return outputs

    def seam_hooks(self) -> list[tuple[str, str, str, dict[str, bool]]]:
        """Take vision features from the tower: what reaches the projector is already shuffled."""
        vision = self.stock_parts().paths["vision"][0]
        looks: list[tuple[str, str, str, dict[str, bool]]] = [
            (vision, "register_forward_pre_hook", "_at_vision_input", {"with_kwargs": True})
        ]
        return [
            *super().seam_hooks(),
            *(looks if takes_pictures(self.custom_connector) else []),
            (vision, "register_forward_hook", "_at_vision_output", {}),
        ]

    def pictures_of_images(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the picture of each image."""
        side, grids = self.vision_model.patch_size, inputs["image_grid_hw"].tolist()
        parts = inputs["pixel_values"].split([rows * columns for rows, columns in grids])
        return [
            patches.from_rows(part, (rows, columns), side) for part, (rows, columns) in zip(parts, grids, strict=True)
        ]

    def _at_vision_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the first of the pictures that a frame of a video is made of: (F, pictures * 3, H, W) -> (F, 3, H, W)."""
        if self.video_inputs is not None:
            self._pictures = args[0][:, :3]

    def _at_vision_output(self, module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
        if self.video_inputs is not None:
            outputs.features = self._vision_features(outputs.features)  # (F, patches, D_vision)
        elif self.image_inputs is not None:
            grids = [(rows, columns) for rows, columns in self.image_inputs["image_grid_hw"].tolist()]
            outputs.features = self.transform_ragged(outputs.features, grids)  # (patches of all images, D_vision)
        return outputs


NAMED_TOKENS = {
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<so_embedding>",
    "image_start_token": "<img>",
    "image_end_token": "</img>",
}
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "<pad>",
    "<so_start>",
    "<so_end>",
    "<|im_start|>",
    "<|im_end|>",
    *NAMED_TOKENS.values(),
)
CHAT_TEMPLATE = tiny.chat_template("<image>", "<|im_start|>{role}\n", "<|im_end|>\n")


def tiny_processor() -> CustomNemotronH_Omni_Reasoning_V3Processor:
    """Return a processor for patches of 8 px and at most 64 of them, with a tokenizer trained on the spot."""
    return CustomNemotronH_Omni_Reasoning_V3Processor(
        tiny.image_processor("NemotronH_Omni_Reasoning_V3ImageProcessor")(
            patch_size=8, min_num_patches=4, max_num_patches=64, max_model_len=512
        ),
        tiny.video_processor(
            "NemotronH_Omni_Reasoning_V3VideoProcessor",
            norm_mean=[0.5] * 3,
            norm_std=[0.25] * 3,
            patch_size=8,
            video_target_num_patches=16,
        ),
        tiny.train_tokenizer(SPECIAL_TOKENS, bos="<s>", eos="<|im_end|>", pad="<pad>", named=NAMED_TOKENS),
        transformers.WhisperFeatureExtractor(feature_size=16),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config() -> CustomNemotronH_Omni_Reasoning_V3_Config:
    """Return a config of the real architecture small enough for a test: 2 + 3 layers, the latter of each kind."""
    processor = tiny_processor()
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2, "chunk_size": 16}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64}
    layers = {"layers_block_type": ["linear_attention", "moe", "full_attention"], "head_dim": 16, **mamba, **experts}
    text = {name: size for name, size in tiny.text_config(processor.tokenizer).items() if name != "num_hidden_layers"}
    return CustomNemotronH_Omni_Reasoning_V3_Config(
        vision_config={
            **tiny.VISION,
            "model_type": "radio",
            "patch_size": 8,
            "image_size": 64,
            "max_img_size": 128,
            "video_temporal_patch_size": 2,
        },
        text_config={**text, **layers, "model_type": "nemotron_h"},
        audio_config={
            **tiny.VISION,
            "num_hidden_layers": 1,
            "num_mel_bins": 16,
            "subsampling_conv_channels": 8,
            "projection_hidden_size": 64,
            "projection_bias": False,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        audio_token_id=processor.audio_token_id,
        vision_hidden_size=tiny.VISION["hidden_size"],
        projector_hidden_size=64,
    )


def published_processor() -> CustomNemotronH_Omni_Reasoning_V3Processor:
    """Return a processor with the image settings of Nemotron 3 Nano Omni and the tiny tokenizer."""
    processor = tiny_processor()
    processor.image_processor = tiny.image_processor("NemotronH_Omni_Reasoning_V3ImageProcessor")()
    return processor


CHECKPOINTS = {
    "nvidia/Nemotron-3-Nano-Omni-30B-A3B-Reasoning-BF16": {
        "vision_config": {"video_temporal_patch_size": 2},
        "text_config": {
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            "hidden_size": 2688,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "mamba_num_heads": 64,
            "n_routed_experts": 128,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "num_experts_per_tok": 6,
            "vocab_size": 131072,
        },
        "audio_config": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "intermediate_size": 4096,
            "num_mel_bins": 128,
            "projection_hidden_size": 4096,
            "projection_bias": False,
        },
        "projector_hidden_size": 20480,
    },
}


register(CustomNemotronH_Omni_Reasoning_V3)
