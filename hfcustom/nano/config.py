"""NanoVLMConfig: a SigLIP config, a Llama config and how the two meet; plain JSON.

A setting that the modules would not follow is an error, not a wrong result.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import LlamaConfig, PretrainedConfig, SiglipVisionConfig

ONLY: dict[str, dict[str, Any]] = {  # what the modules are written for
    "vision_config": {"hidden_act": "gelu_pytorch_tanh"},
    "text_config": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
}


class NanoVLMConfig(PretrainedConfig):
    """Config of NanoVLMForConditionalGeneration; the sub-configs may be given as mappings."""

    model_type = "nano"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": SiglipVisionConfig, "text_config": LlamaConfig}

    vision_config: Any = None
    text_config: Any = None
    scale_factor: int = 4  # a square of so many patches a side becomes one image token
    image_token_id: int = 49152  # the first id after SmolLM2's vocabulary
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name, config_class in self.sub_configs.items():
            given = getattr(self, name)
            if not isinstance(given, PretrainedConfig):
                given = config_class(**{key: value for key, value in (given or {}).items() if key != "model_type"})
            elif not isinstance(given, config_class):
                raise ValueError(f"{name} is a {type(given).__name__}; NanoVLM takes a {config_class.__name__}.")
            setattr(self, name, given)
            check_only(name, given.to_dict(), ONLY[name])
        super().__post_init__(**kwargs)
        check_only("rope_parameters", self.text_config.rope_parameters, {"rope_type": "default"})
        side = self.vision_config.image_size // self.vision_config.patch_size
        if side % self.scale_factor:
            raise ValueError(f"scale_factor={self.scale_factor} does not divide the {side} patches of a side.")


def check_only(what: str, values: dict[str, Any], only: dict[str, Any]) -> None:
    """Raise ValueError for a setting that has another value than the one that is implemented."""
    for name, known in only.items():
        if values.get(name, known) != known:
            raise ValueError(f"The {what} has {name}={values[name]!r}; NanoVLM knows {known!r} only.")
