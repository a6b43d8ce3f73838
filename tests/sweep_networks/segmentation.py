"""The decoders of segmentation_models_pytorch, each with an encoder of another family."""

from functools import partial

from sweep_networks.inputs import Builder, Network
from tensors import noise


def build(name: str, encoder: str) -> Network:
    """Return the network ``name`` on ``encoder``; PAN pools its deepest map three times, so it needs larger images."""
    import segmentation_models_pytorch as smp

    return getattr(smp, name)(encoder, encoder_weights=None), (noise(2, 3, *(128 if name == "PAN" else 64,) * 2),)


PAIRS = """Unet:resnet18 Unet:tu-convnext_atto DeepLabV3Plus:resnet34 UnetPlusPlus:resnet18
UnetPlusPlus:timm-regnetx_002 FPN:resnet18 FPN:mobilenet_v2 FPN:efficientnet-b0 PSPNet:resnet18 Linknet:resnet18
Linknet:densenet121 Linknet:timm-skresnet18 MAnet:resnet18 MAnet:mobileone_s0 PAN:resnet18 PAN:se_resnet50
DeepLabV3:mobilenet_v2 UPerNet:resnet18 Segformer:mit_b0 Unet:vgg11_bn Unet:dpn68 Unet:xception"""

NETWORKS: dict[str, Builder] = {pair: partial(build, *pair.split(":")) for pair in PAIRS.split()}
