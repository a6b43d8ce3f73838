"""Hugging Face's convolutional networks from small configurations, built as their pages say."""

from functools import partial
from typing import Any

from sweep_networks.inputs import Builder, Network, strengthen
from tensors import noise

STAGES: dict[str, Any] = {"depths": [1, 2, 1, 1], "hidden_sizes": [16, 32, 48, 64]}
HEADS: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 5,
}  # fmt: skip


def build(
    kind: str, task: str = "ForImageClassification", inputs: tuple[Any, ...] | None = None, **config: Any
) -> Network:
    """Return the model of the class ``kind`` + ``task``; without ``inputs``, it gets two images."""
    import transformers

    settings = getattr(transformers, f"{kind}Config")(**config)
    return strengthen(getattr(transformers, f"{kind}{task}")(settings)), inputs or (noise(2, 3, 64, 64),)


def build_on_backbone(kind: str, task: str, size: int = 64, **config: Any) -> Network:
    """Return a model with a small ResNet as its backbone."""
    import transformers

    backbone = transformers.ResNetConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], embedding_size=16,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    settings = getattr(transformers, f"{kind}Config")(backbone_config=backbone, **config)
    return getattr(transformers, f"{kind}{task}")(settings), (noise(2, 3, size, size),)


def build_rt_detr(kind: str) -> Network:
    """Return a small RT-DETR."""
    import transformers

    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    settings = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, encoder_in_channels=[32, 48, 64], encoder_hidden_dim=32, decoder_in_channels=[32] * 3,
        d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_layers=2, num_queries=5, num_denoising=0,
        encoder_attention_heads=2, decoder_attention_heads=2, hidden_expansion=0.5,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForObjectDetection")(settings), (noise(2, 3, 64, 64),)


def build_speech(kind: str, **config: Any) -> Network:
    """Return a small encoder of raw audio, in which a tower of 1-D convolutions stands before a transformer."""
    small = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "conv_dim": (8, 8, 8), "conv_kernel": (8, 3, 3), "conv_stride": (4, 2, 2), "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    }  # fmt: skip
    return build(kind, "Model", (noise(2, 400),), **{**small, **config})


CODEC: dict[str, Any] = {"num_filters": 4, "hidden_size": 16, "codebook_size": 8, "upsampling_ratios": [4, 2]}

NETWORKS: dict[str, Builder] = {
    "resnet": partial(build, "ResNet", depths=[1, 2, 1, 1], hidden_sizes=[16, 32, 64, 64], embedding_size=16),
    "convnext": partial(build, "ConvNext", depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64]),
    "regnet": partial(build, "RegNet", depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64], groups_width=8),
    "resnet-basic": partial(build, "ResNet", **STAGES, embedding_size=16, layer_type="basic"),
    "regnet-x": partial(build, "RegNet", **STAGES, groups_width=8, layer_type="x"),
    "convnextv2": partial(build, "ConvNextV2", **STAGES),
    "efficientnet": partial(build, "EfficientNet", width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=320),
    "mobilenet_v1": partial(build, "MobileNetV1", depth_multiplier=0.25),
    "mobilenet_v2": partial(build, "MobileNetV2", depth_multiplier=0.35),
    "mobilenet_v2-segmentation": partial(build, "MobileNetV2", "ForSemanticSegmentation", depth_multiplier=0.35),
    "bit": partial(build, "Bit", **STAGES, embedding_size=16, num_groups=4),
    "bit-bottleneck": partial(build, "Bit", **STAGES, embedding_size=16, num_groups=4, layer_type="bottleneck"),
    "poolformer": partial(build, "PoolFormer", **STAGES),
    "levit": partial(
        build, "Levit", hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
        image_size=64,
    ),
    "segformer": partial(
        build, "Segformer", "ForSemanticSegmentation", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
    ),
    "mobilevit": partial(
        build, "MobileViT", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 80], image_size=64,
        num_attention_heads=2,
    ),
    "mobilevitv2": partial(build, "MobileViTV2", width_multiplier=0.5, image_size=64),
    "cvt": partial(build, "Cvt", embed_dim=[8, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    "pvt_v2": partial(
        build, "PvtV2", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
    ),
    "focalnet": partial(build, "FocalNet", embed_dim=16, depths=[1, 1, 1, 1], image_size=64),
    "swiftformer": partial(build, "SwiftFormer", depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32]),
    "textnet": partial(
        build, "TextNet", stem_out_channels=8, hidden_sizes=[8, 8, 16, 24, 32],
    ),
    "hgnet_v2": partial(build, "HGNetV2"),
    "pp-lcnet": partial(build, "PPLCNet", scale=0.25),
    "dinov3-convnext": partial(build, "DINOv3ConvNext", "Model", **STAGES),
    "glpn": partial(
        build, "GLPN", "ForDepthEstimation", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
    ),
    "swin2sr": partial(
        build, "Swin2SR", "ForImageSuperResolution", embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=64,
    ),
    "upernet": partial(
        build_on_backbone, "UperNet", "ForSemanticSegmentation", hidden_size=32, pool_scales=[1, 2],
        auxiliary_in_channels=48,
    ),
    "detr": partial(build_on_backbone, "Detr", "ForObjectDetection", **HEADS, use_timm_backbone=False),
    "conditional-detr": partial(
        build_on_backbone, "ConditionalDetr", "ForObjectDetection", **HEADS, use_timm_backbone=False,
    ),
    "deformable-detr": partial(
        build_on_backbone, "DeformableDetr", "ForObjectDetection", **{**HEADS, "decoder_layers": 2},
        use_timm_backbone=False,
    ),
    "rt-detr": partial(build_rt_detr, "RTDetr"),
    "rt-detr-v2": partial(build_rt_detr, "RTDetrV2"),
    "wav2vec2": partial(build_speech, "Wav2Vec2"),
    "hubert": partial(build_speech, "Hubert", feat_extract_norm="layer", do_stable_layer_norm=True),
    "wavlm": partial(build_speech, "WavLM"),
    "sew": partial(build_speech, "SEW", squeeze_factor=2),
    "encodec": partial(build, "Encodec", "Model", (noise(2, 1, 320),), **CODEC),
    "dac": partial(
        build, "Dac", "Model", (noise(2, 1, 320),), encoder_hidden_size=8, downsampling_ratios=[2, 4], n_codebooks=2,
        codebook_size=8, codebook_dim=4, hidden_size=32, decoder_hidden_size=32, upsampling_ratios=[4, 2],
    ),
    "hifi-gan": partial(
        build, "SpeechT5HifiGan", "", (noise(2, 12, 8),), model_in_dim=8, upsample_initial_channel=16,
        upsample_rates=[4, 2], upsample_kernel_sizes=[8, 4], resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
    ),
    "superpoint": partial(build, "SuperPoint", "ForKeypointDetection", (noise(1, 3, 64, 64),)),
    "patchtsmixer": partial(
        build, "PatchTSMixer", "Model", (noise(2, 32, 3),), context_length=32, patch_length=8, patch_stride=8,
        num_input_channels=3, d_model=8, num_layers=2,
    ),
}  # fmt: skip
