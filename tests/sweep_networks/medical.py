"""MONAI's networks, most of them in three dimensions."""

from functools import partial
from typing import Any

from sweep_networks.inputs import Builder, Network, strengthen
from tensors import noise

VOLUME: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}


def build(kind: str, *shape: int, **options: Any) -> Network:
    """Return the network ``kind`` and two inputs of ``shape``."""
    from monai.networks import nets

    model = getattr(nets, kind)(**options)
    return strengthen(model) if kind == "HighResNet" else model, (noise(2, *shape),)


UNET: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}

NETWORKS: dict[str, Builder] = {
    "resnet10-3d": partial(build, "resnet10", 1, 24, 24, 24, spatial_dims=3, n_input_channels=1, num_classes=2),
    "unet-3d": partial(build, "UNet", 1, 16, 16, 16, **VOLUME, **UNET, num_res_units=2),
    "dynunet-3d": partial(
        build, "DynUNet", 1, 16, 16, 16, **VOLUME, kernel_size=[3, 3, 3], strides=[1, 2, 2],
        upsample_kernel_size=[2, 2], filters=[8, 16, 32], res_block=True,
    ),
    "dynunet-2d-supervised": partial(
        build, "DynUNet", 1, 32, 32, spatial_dims=2, in_channels=1, out_channels=2, kernel_size=[3, 3, 3, 3],
        strides=[1, 2, 2, 2], upsample_kernel_size=[2, 2, 2], filters=[8, 16, 32, 32], deep_supervision=True,
        deep_supr_num=2,
    ),
    "segresnet-3d": partial(
        build, "SegResNet", 1, 16, 16, 16, **VOLUME, init_filters=8, blocks_down=(1, 2), blocks_up=(1,),
    ),
    "segresnet-ds": partial(build, "SegResNetDS", 1, 16, 16, 16, **VOLUME, init_filters=8, blocks_down=(1, 2)),
    "densenet-3d": partial(
        build, "DenseNet", 1, 32, 32, 32, **VOLUME, init_features=8, growth_rate=4, block_config=(2, 2, 2),
    ),
    "seresnet50-2d": partial(build, "SEResNet50", 3, 64, 64, spatial_dims=2, in_channels=3),
    "vnet-3d": partial(build, "VNet", 1, 16, 16, 16, dropout_prob_up=(0.2, 0.2)),
    "attention-unet-2d": partial(
        build, "AttentionUnet", 1, 32, 32, spatial_dims=2, in_channels=1, out_channels=2, **UNET,
    ),
    "basic-unet-2d": partial(
        build, "BasicUNet", 1, 32, 32, spatial_dims=2, in_channels=1, out_channels=2, features=(8, 8, 16, 16, 16, 8),
    ),
    "basic-unet-plus-plus-2d": partial(
        build, "BasicUNetPlusPlus", 1, 32, 32, spatial_dims=2, in_channels=1, out_channels=2,
        features=(8, 8, 16, 16, 16, 8),
    ),
    "highresnet-3d": partial(build, "HighResNet", 1, 16, 16, 16, **VOLUME),
    "efficientnet-b0-2d": partial(build, "EfficientNetBN", 3, 64, 64, model_name="efficientnet-b0", pretrained=False),
    "flexible-unet-2d": partial(
        build, "FlexibleUNet", 3, 64, 64, in_channels=3, out_channels=2, backbone="resnet18", pretrained=False,
    ),
    "autoencoder-2d": partial(
        build, "AutoEncoder", 1, 32, 32, spatial_dims=2, in_channels=1, out_channels=1, channels=(8, 16, 32),
        strides=(2, 2, 2), num_res_units=1,
    ),
    "swin-unetr-2d": partial(
        build, "SwinUNETR", 1, 64, 64, in_channels=1, out_channels=2, feature_size=12, spatial_dims=2,
        depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2),
    ),
    "mednext-3d": partial(build, "MedNeXt", 1, 32, 32, 32, **VOLUME, init_filters=8, encoder_expansion_ratio=2),
    "patch-discriminator-2d": partial(
        build, "PatchDiscriminator", 3, 64, 64, spatial_dims=2, channels=8, in_channels=3, num_layers_d=2,
    ),
    "voxelmorph-unet-3d": partial(
        build, "VoxelMorphUNet", 2, 32, 32, 32, spatial_dims=3, in_channels=2, unet_out_channels=3,
        channels=(8, 8, 8, 8), final_conv_channels=(8,),
    ),
}  # fmt: skip
