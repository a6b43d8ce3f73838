"""diffusers' U-Nets and autoencoders, with few channels."""

from functools import partial
from typing import Any

import torch

from sweep_networks.inputs import Builder, Network
from tensors import noise

TIME = torch.tensor([10, 20])
NARROW: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4}
CODER: dict[str, Any] = {
    **NARROW, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def build(kind: str, *inputs: Any, **config: Any) -> Network:
    """Return the model of the class ``kind`` and its inputs."""
    import diffusers

    model = getattr(diffusers, kind)(**config)
    with torch.no_grad():  # torch cannot copy a network with the older weight norm before that
        model(*inputs)
    return model, inputs


def build_conditional(kind: str, *shape: int, **config: Any) -> Network:
    """Return a U-Net that also takes a sequence of text features."""
    options: dict[str, Any] = {"cross_attention_dim": 8, "attention_head_dim": 4, "layers_per_block": 1}
    return build(kind, noise(2, 4, *shape), TIME, noise(2, 5, 8), **{**options, **NARROW, **config})


NETWORKS: dict[str, Builder] = {
    "unet2d": partial(
        build, "UNet2DModel", noise(2, 3, 16, 16), TIME, **NARROW, sample_size=16, layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
    "unet2d-resnet-sampling": partial(
        build, "UNet2DModel", noise(2, 3, 16, 16), TIME, sample_size=16, layers_per_block=2, **NARROW,
        down_block_types=("ResnetDownsampleBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"),
        resnet_time_scale_shift="scale_shift", add_attention=False,
    ),
    "unet1d": partial(
        build, "UNet1DModel", noise(2, 2, 64), TIME, block_out_channels=(32, 64), norm_num_groups=4, in_channels=2,
        extra_in_channels=64, sample_size=64, down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
    ),
    "unet2d-condition": partial(
        build_conditional, "UNet2DConditionModel", 16, 16, sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "unet3d-condition": partial(
        build_conditional, "UNet3DConditionModel", 3, 16, 16, sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ),
    "autoencoder-kl": partial(build, "AutoencoderKL", noise(2, 3, 16, 16), latent_channels=4, sample_size=16, **CODER),
    "autoencoder-kl-temporal": partial(
        build, "AutoencoderKLTemporalDecoder", noise(2, 3, 64, 64), block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
    ),
    "asymmetric-autoencoder-kl": partial(
        build, "AsymmetricAutoencoderKL", noise(2, 3, 16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 16), layers_per_down_block=1, up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(8, 16), layers_per_up_block=1, norm_num_groups=4,
    ),
    "vq": partial(
        build, "VQModel", noise(2, 3, 16, 16), **CODER, latent_channels=3, num_vq_embeddings=16, sample_size=16,
    ),
    "autoencoder-tiny": partial(
        build, "AutoencoderTiny", noise(2, 3, 16, 16), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1),
    ),
    "autoencoder-oobleck": partial(
        build, "AutoencoderOobleck", noise(2, 2, 64), encoder_hidden_size=8, downsampling_ratios=[2, 4],
        decoder_channels=8, decoder_input_channels=4, channel_multiples=[1, 2],
    ),
    "autoencoder-dc": partial(
        build, "AutoencoderDC", noise(2, 3, 32, 32), latent_channels=8, attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    ),
    "t2i-adapter": partial(
        build, "T2IAdapter", noise(2, 3, 64, 64), channels=[8, 16, 16], num_res_blocks=1, downscale_factor=8,
    ),
}  # fmt: skip
