"""timm's networks: classifiers, and feature extractors (``features_only``), which run a network's stages in a row."""

from functools import partial
from typing import Any

from sweep_networks.inputs import Builder, Network, pair_with_image
from tensors import noise

CLASSIFIERS = """botnet26t_256 coatnet_pico_rw_224 convformer_s18 convmixer_768_32 convnext_atto convnextv2_atto
cpubone_nano cs3darknet_focus_s csatv2 cspdarknet53 cspnext_tiny cspresnet50 darknet53 davit_tiny densenet121 dla34
dla46_c dla60_res2net dm_nfnet_f0 dpn48b dpn68 eca_nfnet_l0 ecaresnet26t edgenext_xx_small efficientformer_l1
efficientformerv2_s0 efficientnet_b0 efficientnet_es efficientnet_lite0 efficientvim_m1 efficientvit_b0
efficientvit_m0 ese_vovnet19b_dw fasternet_t0 fastvit_t8 fbnetc_100 fbnetv3_b focalnet_tiny_srf gernet_s
ghostnet_050 ghostnetv2_100 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hrnet_w18_small inception_next_atto
inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_050 lcnetv2_small legacy_seresnet18
legacy_xception levit_conv_128s lowformer_b0 mambaout_femto maxvit_rmlp_pico_rw_256 mixnet_s mnasnet_050
mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs
mobilevitv2_050 nextvit_small nf_regnet_b0 nf_resnet26 nfnet_l0 poolformer_s12 poolformerv2_s12 pvt_v2_b0 rdnet_tiny
regnetx_002 regnety_002 regnetz_005 regnetz_b16 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_14w_8s res2next50
resnest14d resnet10t resnet18 resnet26d resnet50 resnetaa50 resnetblur50 resnetv2_18 resnetv2_50 resnetv2_50d_evos
resnetv2_50d_gn resnetv2_50x1_bit resnext50_32x4d rexnet_100 selecsls42 seresnet50 shvit_s1 skresnet18 spnasnet_100
starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 tf_efficientnetv2_b0 tinynet_e tresnet_m vgg11_bn
visformer_tiny vovnet39a xception41 xception41p"""

MORE = """bat_resnext26ts eca_botnext26ts_256 eca_resnext26ts gcresnext26ts gcresnet33ts lamhalobotnet50ts_256
mixnet_xl mobilenet_edgetpu_v2_xs seresnext26t_32x4d test_byobnet test_convnext test_convnext2 test_convnext3
test_efficientnet test_efficientnet_evos test_efficientnet_gn test_efficientnet_ln test_mambaout test_nfnet
test_resnet"""

EXTRACTORS = """vgg11 vgg11_bn densenet121 ese_vovnet19b_dw resnet18 resnet26d efficientnet_b0 mobilenetv3_small_050
convnext_atto regnetx_002 hrnet_w18_small dla34 cspresnet50 repvgg_a0 selecsls42 hardcorenas_a"""


def build(name: str, **options: Any) -> Network:
    """Return timm's network ``name``."""
    import timm

    return pair_with_image(timm.create_model(name, **options))


def build_extractor(name: str) -> Network:
    """Return the feature extractor of timm's network ``name``."""
    import timm

    return timm.create_model(name, features_only=True), (noise(2, 3, 64, 64),)


NETWORKS: dict[str, Builder] = {
    **{name: partial(build, name) for name in (CLASSIFIERS + " " + MORE).split()},
    **{f"features-{name}": partial(build_extractor, name) for name in EXTRACTORS.split()},
}
