"""The JSON files of a diffusers folder, true to the (shrunken) widths of its tensors."""

from realnames import TEXT_ENCODERS

Config = dict[str, object]

WIDTHS = (320, 640, 1280, 1280)
CLIP_HEADS = {768: 12, 1024: 16, 1280: 20}
TEXT_WIDTHS = {
    "sd1": {"text_encoder": 768},
    "sd2": {"text_encoder": 1024},
    "sdxl": {"text_encoder": 768, "text_encoder_2": 1280},
}
CLIP_LAYERS = {768: 12, 1024: 23, 1280: 32}


def configs(architecture: str, *, factor: int) -> dict[str, Config]:
    """Return the configuration files of a folder by their relative path."""
    files: dict[str, Config] = {
        "model_index.json": _model_index(architecture),
        "unet/config.json": _unet(architecture, factor),
        "vae/config.json": {"_class_name": "AutoencoderKL", "latent_channels": 4},
        "scheduler/scheduler_config.json": {"_class_name": "EulerDiscreteScheduler"},
        "tokenizer/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"},
    }
    for component, width in TEXT_WIDTHS[architecture].items():
        files[f"{component}/config.json"] = _text_encoder(component, width, factor)
    return files


def _model_index(architecture: str) -> Config:
    pipeline = "StableDiffusionXLPipeline" if architecture == "sdxl" else "StableDiffusionPipeline"
    parts: Config = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    for component in TEXT_ENCODERS[architecture]:
        parts[component] = ["transformers", _clip_class(component)]
    return parts | {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }


def _unet(architecture: str, factor: int) -> Config:
    config: Config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        # GroupNorm's groups must divide every width and every sum of two widths.
        "norm_num_groups": 32 if factor == 1 else 5,
    }
    if architecture == "sdxl":
        return config | {
            "block_out_channels": [width // factor for width in WIDTHS[:3]],
            "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
            "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "cross_attention_dim": 2048 // factor,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256 // factor,
            "projection_class_embeddings_input_dim": 2816 // factor,
        }
    linear = architecture == "sd2"
    return config | {
        "block_out_channels": [width // factor for width in WIDTHS],
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "attention_head_dim": [5, 10, 20, 20] if linear else (8 if factor == 1 else 5),
        "use_linear_projection": linear,
        "cross_attention_dim": (1024 if linear else 768) // factor,
    }


def _clip_class(component: str) -> str:
    return "CLIPTextModelWithProjection" if component == "text_encoder_2" else "CLIPTextModel"


def _text_encoder(component: str, width: int, factor: int) -> Config:
    return {
        "architectures": [_clip_class(component)],
        "model_type": "clip_text_model",
        "hidden_size": width // factor,
        "intermediate_size": 4 * width // factor,
        "num_attention_heads": CLIP_HEADS[width],
        "num_hidden_layers": CLIP_LAYERS[width],
        "projection_dim": width // factor,
        "vocab_size": 49408 // factor,
        "max_position_embeddings": 77,
    }
