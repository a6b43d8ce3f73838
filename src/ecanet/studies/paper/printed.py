"""Everything that the ECA-Net paper (CVPR 2020, arXiv 1910.03151) and its poster print, table by table.

The last table holds what the authors of later modules print for their networks.
`rows.parse_table` explains the notation. Every row of ECA names its kernel sizes: "official" ones are those of the
authors' released checkpoints.
"""
# ruff: noqa: E501 (a row is a line)

from ecanet.studies.paper.rows import Table, parse_table

__all__ = ["FIGURE_4", "FOOTNOTES", "TABLES", "TABLE_3"]

FOOTNOTES: dict[str, str] = {
    "top5": "Table 2 and the poster's ablation print 92.25; Table 3 and the poster's ImageNet table print 92.52. Two "
    "digits are swapped: 92.52 fits the 7.48 % error of the source that both numbers are copied from.",
    "k3": "k = 3 in every block, which is 48 parameters in ResNet-50. This is not the network of Table 3.",
    "ns": "The k of ECA-NS is not printed; its context suggests 3. Equation 6 as printed starts its band at the "
    "diagonal; the authors' code and this library centre it.",
    "k": "The paper calls k adaptive, but the released checkpoint has k = 3, 5, 5, 7 by stage (80 parameters, the "
    "number that the paper states). Equation 12 gives 5, 5, 5, 7 for the block's output and 3, 5, 5, 5 for its width.",
    "k3357": "The released checkpoint has k = 3, 3, 5, 7 by stage; Equation 12 gives 5, 5, 5, 7.",
    "k3577": "The released checkpoint has k = 3, 5, 7, 7 by stage; Equation 12 gives 3, 5, 5, 5.",
    "k13": "The released checkpoint has k = 1 below 96 channels and k = 3 from 96 channels on (31 parameters); Equation "
    "12 gives 3 and 5.",
    "readme50": "The authors' README says 77.42 / 93.62 since 2019-11, when new models were uploaded.",
    "readme18": "The authors' README says 70.92 / 89.93.",
    "readme152": "The authors' README says 57.41M; the exact number is 57.404.",
    "base": "The accuracy is copied from the SENet paper, which used another framework and other strides. The authors "
    "trained their own networks themselves, so the difference is not due to ECA alone. torchvision's ResNet-50 (V1 "
    "weights) has 76.13.",
    "r152": "The first README of the authors said 77.00 / 93.30.",
    "cut": "The rules that give every other cell give 319.97 here; 319.9 is that number truncated. The authors' code "
    "writes the classifier's pool as two means, which no counter of modules sees; without the pool the count is 319.91.",
    "copied": "Parameters and operations are copied from the method's own paper, probably in units of 10^6 and 10^9.",
    "dagger": "Source code and models were not public, so the paper does not compare the speed.",
    "aug": "Trained with stronger augmentation and other learning rates.",
    "gsop": "A reader reports that GSoP-Net's own paper has 77.98 (its README: 22.02 % error). The additional operations "
    "come from the last stage, which keeps its resolution.",
    "cbam34": "20.943M needs biases in the two layers of the channel gate. Here the layers have none, as in CBAM's "
    "equation.",
    "fps": "The paper does not state batch, precision, GPUs and method behind its frames per second, so only ratios to "
    "the plain network are compared here.",
    "nosigmoid": "Figure 3 of one version of the paper omits the sigmoid; equations and code have it.",
    "digitised": "The figure prints no values: these were read off its picture, to about 0.003. The paper's text says a "
    "spread of about 0.15 and 0.5; the points have 0.11 and 0.58.",
    "gain17": "The text says a gain of 1.8; the table gives 1.7.",
    "detk": "The detection backbones have other kernels than Table 3's (k = 5, or 3, 3, 7, 7, by the checkpoints' "
    "names).",
    "authors": "From the README of the authors' code, which does not have every column. They train in other ways than "
    "the ECA-Net paper, so do not compare accuracies across tables.",
    "everyconv": "The authors have a GCT before every convolution; here there is one at the end of each branch. They say "
    "that a single one, before the last 1x1 convolution, is 0.1 to 0.2 points lower.",
    "pooled": "Our count has no pools and products by position: plain ResNet-50 has 4.09 x 10^9 here.",
    "ofema": "From the README of EMA's authors.",
    "expanded": "The authors place the module elsewhere in the block; here it is at the end of each branch.",
    "unprinted": "The authors print other networks or other data sets only.",
    "unread": "Nothing is copied from this paper, whose tables could not be checked when this table was written.",
    "gcnet": "Apparently copied from GCNet's paper, which also counts the frozen parameters, and counts operations by "
    "other rules. Here every block has a GC block.",
}

TABLE_1 = parse_table(
    "1",
    "Attention modules compared",
    """
    network | Model | No DR | Cross-channel interaction | Lightweight | notes
    - | SENet | no | yes | - |
    - | CBAM | no | yes | no |
    - | GE-θ⁻ | yes | no | yes |
    - | GE-θ | yes | no | no |
    - | GE-θ⁺ | no | yes | no |
    - | A2-Net | no | yes | no |
    - | GSoP-Net | no | yes | no |
    - | ECA-Net | yes | yes | yes |
    """,
)

TABLE_2 = parse_table(
    "2",
    "Variants of channel attention, ResNet-50, ImageNet",
    """
    network | Method | Attention | #Param | Top-1 | Top-5 | notes
    resnet50 none | Vanilla | N/A | 0 | 75.20 | 92.25 | top5 base
    resnet50 se | SE | σ(f_{W1,W2}(y)) | 2C²/r | 76.71 | 93.38 | base
    resnet50 se-var1 | SE-Var1 | σ(y) | 0 | 76.00 | 92.90 |
    resnet50 se-var2 | SE-Var2 | σ(w ⊙ y) | C | 77.07 | 93.31 |
    resnet50 se-var3 | SE-Var3 | σ(W y) | C² | 77.42 | 93.64 |
    resnet50 se-gc groups=16 | SE-GC1 | σ(GC_16(y)) | C²/16 | 76.95 | 93.47 |
    resnet50 se-gc width=16 | SE-GC2 | σ(GC_{C/16}(y)) | 16C | 76.98 | 93.31 |
    resnet50 se-gc width=8 | SE-GC3 | σ(GC_{C/8}(y)) | 8C | 76.96 | 93.38 |
    resnet50 eca-ns k=3,3,3,3 | ECA-NS | σ(ω) with Eq. (7) | kC | 77.35 | 93.61 | ns
    resnet50 eca k=3,3,3,3 | ECA (ours) | σ(C1D_k(y)) | k = 3 | 77.43 | 93.65 | k3 nosigmoid
    """,
)

TABLE_3 = parse_table(
    "3",
    "Attention methods on ImageNet",
    """
    network | Method | Backbone | #Param | FLOPs | Train FPS | Infer FPS | Top-1 | Top-5 | notes
    resnet50 none | ResNet | R-50 | 24.37M | 3.86G | 1024 | 1855 | 75.20 | 92.52 | own base fps
    resnet50 se | SENet | R-50 | 26.77M | 3.87G | 759 | 1620 | 76.71 | 93.38 | own base
    resnet50 cbam | CBAM | R-50 | 26.77M | 3.87G | 472 | 1213 | 77.34 | 93.69 |
    resnet50 a2 | A2-Nets | R-50 | 33.00M | 6.50G | N/A | N/A | 77.00 | 93.50 | copied dagger
    resnet50 gc | GCNet | R-50 | 28.08M | 3.87G | N/A | N/A | 77.70 | 93.66 | copied
    resnet50 gsop | GSoP-Net1 | R-50 | 28.05M | 6.18G | 596 | 1383 | 77.68 | 93.98 | copied gsop
    resnet50 aa | AA-Net | R-50 | 25.80M | 4.15G | N/A | N/A | 77.70 | 93.80 | copied dagger aug
    resnet50 eca k=official | ECA-Net (ours) | R-50 | 24.37M | 3.86G | 785 | 1805 | 77.48 | 93.68 | own k readme50
    resnet101 none | ResNet | R-101 | 42.49M | 7.34G | 386 | 1174 | 76.83 | 93.48 | own base
    resnet101 se | SENet | R-101 | 47.01M | 7.35G | 367 | 1044 | 77.62 | 93.93 | own base
    resnet101 cbam | CBAM | R-101 | 47.01M | 7.35G | 270 | 635 | 78.49 | 94.31 |
    resnet101 aa | AA-Net | R-101 | 45.40M | 8.05G | N/A | N/A | 78.70 | 94.40 | copied dagger aug
    resnet101 eca k=official | ECA-Net (ours) | R-101 | 42.49M | 7.35G | 380 | 1089 | 78.65 | 94.34 | own k3357
    resnet152 none | ResNet | R-152 | 57.40M | 10.82G | 281 | 815 | 77.58 | 93.66 | own base r152
    resnet152 se | SENet | R-152 | 63.68M | 10.85G | 268 | 761 | 78.43 | 94.27 | own base
    resnet152 eca k=official | ECA-Net (ours) | R-152 | 57.40M | 10.83G | 279 | 785 | 78.92 | 94.55 | own k3357 readme152
    mobilenet_v2 none | MobileNetV2 | MobileNetV2 | 3.34M | 319.4M | 711 | 2086 | 71.64 | 90.20 | own
    mobilenet_v2 se reduction=8 | SENet (r=8) | MobileNetV2 | 3.40M | 320.1M | 671 | 2000 | 72.42 | 90.67 | own
    mobilenet_v2 eca k=official | ECA-Net (ours) | MobileNetV2 | 3.34M | 319.9M | 676 | 2010 | 72.56 | 90.81 | own k13 cut
    """,
)

POSTER = parse_table(
    "poster",
    "ResNet-18 and ResNet-34 on ImageNet (the authors' poster)",
    """
    network | Method | Backbone | #Param | FLOPs | Top-1 | Top-5 | notes
    resnet18 none | ResNet | R-18 | 11.148M | 1.699G | 70.40 | 89.45 | own base
    resnet18 se | SENet | R-18 | 11.231M | 1.700G | 70.59 | 89.78 | own base
    resnet18 eca k=official | ECA-Net (ours) | R-18 | 11.148M | 1.700G | 70.78 | 89.92 | own k3577 readme18
    resnet34 none | ResNet | R-34 | 20.788M | 3.427G | 73.31 | 91.40 | own base
    resnet34 se | SENet | R-34 | 20.938M | 3.428G | 73.87 | 91.65 | own base
    resnet34 cbam | CBAM | R-34 | 20.943M | 3.428G | 74.01 | 91.76 | cbam34
    resnet34 eca k=official | ECA-Net (ours) | R-34 | 20.788M | 3.428G | 74.21 | 91.83 | own k3357
    """,
)

TABLE_4 = parse_table(
    "4",
    "Other networks on ImageNet",
    """
    network | Model | #Param | FLOPs | Top-1 | Top-5 | notes
    torchvision:resnet200 | ResNet-200 | 74.45M | 14.10G | 78.20 | 94.00 |
    torchvision:inception_v3 | Inception-v3 | 25.90M | 5.36G | 77.45 | 93.56 |
    torchvision:resnext101_32x4d | ResNeXt-101 | 46.66M | 7.53G | 78.80 | 94.40 |
    torchvision:densenet264 | DenseNet-264 (k=32) | 31.79M | 5.52G | 77.85 | 93.78 |
    torchvision:densenet161 | DenseNet-161 (k=48) | 27.35M | 7.34G | 77.65 | 93.80 |
    resnet50 eca k=official | ECA-Net50 | 24.37M | 3.86G | 77.48 | 93.68 | own k readme50
    resnet101 eca k=official | ECA-Net101 | 42.49M | 7.35G | 78.65 | 94.34 | own k3357
    """,
)

TABLE_5 = parse_table(
    "5",
    "Detection, COCO val2017",
    """
    network | Method | Detector | #Param | GFLOPs | AP | AP50 | AP75 | AP_S | AP_M | AP_L | notes
    faster_rcnn/resnet50 none | ResNet-50 | Faster R-CNN | 41.53M | 207.07 | 36.4 | 58.2 | 39.2 | 21.8 | 40.0 | 46.2 | own
    faster_rcnn/resnet50 se | R-50 + SE | Faster R-CNN | 44.02M | 207.18 | 37.7 | 60.1 | 40.9 | 22.9 | 41.9 | 48.2 | own
    faster_rcnn/resnet50 eca k=5,5,5,5 | R-50 + ECA | Faster R-CNN | 41.53M | 207.18 | 38.0 | 60.6 | 40.9 | 23.4 | 42.1 | 48.0 | own detk
    faster_rcnn/resnet101 none | ResNet-101 | Faster R-CNN | 60.52M | 283.14 | 38.7 | 60.6 | 41.9 | 22.7 | 43.2 | 50.4 | own
    faster_rcnn/resnet101 se | R-101 + SE | Faster R-CNN | 65.24M | 283.33 | 39.6 | 62.0 | 43.1 | 23.7 | 44.0 | 51.4 | own
    faster_rcnn/resnet101 eca k=official | R-101 + ECA | Faster R-CNN | 60.52M | 283.32 | 40.3 | 62.9 | 44.0 | 24.5 | 44.7 | 51.3 | own
    mask_rcnn/resnet50 none | ResNet-50 | Mask R-CNN | 44.18M | 275.58 | 37.2 | 58.9 | 40.3 | 22.2 | 40.7 | 48.0 | own
    mask_rcnn/resnet50 se | R-50 + SE | Mask R-CNN | 46.67M | 275.69 | 38.7 | 60.9 | 42.1 | 23.4 | 42.7 | 50.0 | own
    mask_rcnn/resnet50 non-local | R-50 + 1 NL | Mask R-CNN | 46.50M | 288.70 | 38.0 | 59.8 | 41.0 | N/A | N/A | N/A | gcnet
    mask_rcnn/resnet50 gc | R-50 + GC | Mask R-CNN | 46.90M | 279.60 | 39.4 | 61.6 | 42.4 | N/A | N/A | N/A | gcnet
    mask_rcnn/resnet50 eca k=3,3,7,7 | R-50 + ECA | Mask R-CNN | 44.18M | 275.69 | 39.0 | 61.3 | 42.1 | 24.2 | 42.8 | 49.9 | own detk
    mask_rcnn/resnet101 none | ResNet-101 | Mask R-CNN | 63.17M | 351.65 | 39.4 | 60.9 | 43.3 | 23.0 | 43.7 | 51.4 | own
    mask_rcnn/resnet101 se | R-101 + SE | Mask R-CNN | 67.89M | 351.84 | 40.7 | 62.5 | 44.3 | 23.9 | 45.2 | 52.8 | own
    mask_rcnn/resnet101 eca k=official | R-101 + ECA | Mask R-CNN | 63.17M | 351.83 | 41.3 | 63.1 | 44.8 | 25.1 | 45.8 | 52.9 | own
    retinanet/resnet50 none | ResNet-50 | RetinaNet | 37.74M | 239.32 | 35.6 | 55.5 | 38.2 | 20.0 | 39.6 | 46.8 | own
    retinanet/resnet50 se | R-50 + SE | RetinaNet | 40.23M | 239.43 | 37.1 | 57.2 | 39.9 | 21.2 | 40.7 | 49.3 | own
    retinanet/resnet50 eca k=3,3,7,7 | R-50 + ECA | RetinaNet | 37.74M | 239.43 | 37.3 | 57.7 | 39.6 | 21.9 | 41.3 | 48.9 | own detk gain17
    retinanet/resnet101 none | ResNet-101 | RetinaNet | 56.74M | 315.39 | 37.7 | 57.5 | 40.4 | 21.1 | 42.2 | 49.5 | own
    retinanet/resnet101 se | R-101 + SE | RetinaNet | 61.45M | 315.58 | 38.7 | 59.1 | 41.6 | 22.1 | 43.1 | 50.9 | own
    retinanet/resnet101 eca k=official | R-101 + ECA | RetinaNet | 56.74M | 315.57 | 39.1 | 59.9 | 41.8 | 22.8 | 43.4 | 50.6 | own
    """,
)

TABLE_6 = parse_table(
    "6",
    "Instance segmentation, COCO val2017, Mask R-CNN",
    """
    network | Method | AP | AP50 | AP75 | AP_S | AP_M | AP_L | notes
    mask_rcnn/resnet50 none | ResNet-50 | 34.1 | 55.5 | 36.2 | 16.1 | 36.7 | 50.0 | own
    mask_rcnn/resnet50 se | R-50 + SE | 35.4 | 57.4 | 37.8 | 17.1 | 38.6 | 51.8 | own
    mask_rcnn/resnet50 non-local | R-50 + 1 NL | 34.7 | 56.7 | 36.6 | N/A | N/A | N/A | gcnet
    mask_rcnn/resnet50 gc | R-50 + GC | 35.7 | 58.4 | 37.6 | N/A | N/A | N/A | gcnet
    mask_rcnn/resnet50 eca k=3,3,7,7 | R-50 + ECA | 35.6 | 58.1 | 37.7 | 17.6 | 39.0 | 51.8 | own detk
    mask_rcnn/resnet101 none | ResNet-101 | 35.9 | 57.7 | 38.4 | 16.8 | 39.1 | 53.6 | own
    mask_rcnn/resnet101 se | R-101 + SE | 36.8 | 59.3 | 39.2 | 17.2 | 40.3 | 53.6 | own
    mask_rcnn/resnet101 eca k=official | R-101 + ECA | 37.4 | 59.9 | 39.8 | 18.1 | 41.1 | 54.1 | own
    """,
)

FIGURE_4 = parse_table(
    "figure4",
    "Top-1 against a fixed k, and the two lines drawn beside it",
    """
    network | Backbone | k | Top-1 | notes
    resnet50 eca k=3,3,3,3 | ECA-Net50 | 3 | 77.43 | digitised
    resnet50 eca k=5,5,5,5 | ECA-Net50 | 5 | 77.37 |
    resnet50 eca k=7,7,7,7 | ECA-Net50 | 7 | 77.42 |
    resnet50 eca k=9,9,9,9 | ECA-Net50 | 9 | 77.48 |
    resnet50 eca k=official | ECA-Net50 | adaptive | 77.48 | k
    resnet50 se | ECA-Net50 | SENet | 76.71 | base
    resnet101 eca k=3,3,3,3 | ECA-Net101 | 3 | 78.47 | digitised
    resnet101 eca k=5,5,5,5 | ECA-Net101 | 5 | 78.57 |
    resnet101 eca k=7,7,7,7 | ECA-Net101 | 7 | 77.99 |
    resnet101 eca k=9,9,9,9 | ECA-Net101 | 9 | 78.55 |
    resnet101 eca k=official | ECA-Net101 | adaptive | 78.65 | k3357
    resnet101 se | ECA-Net101 | SENet | 77.62 | base
    """,
)

LATER = parse_table(
    "later",
    "Attention modules of later papers on ImageNet",
    """
    network | Method | Backbone | #Param | MACs | Top-1 | Top-5 | notes
    resnet50 none | ResNet | R-50 | N/A | N/A | N/A | N/A |
    resnet50 ese | eSE | R-50 | N/A | N/A | N/A | N/A | unprinted
    resnet50 gct | GCT | R-50 | N/A | N/A | 77.3 | N/A | authors everyconv
    resnet50 srm | SRM | R-50 | N/A | N/A | N/A | N/A | unread
    resnet50 fca | FcaNet | R-50 | N/A | N/A | 78.52 | N/A | authors
    resnet50 simam e_lambda=0.1 | SimAM | R-50 | 25.56M | 4.11G | 77.45 | 93.66 | authors pooled
    resnet50 coord | Coordinate attention | R-50 | N/A | N/A | N/A | N/A | unprinted
    resnet50 ela | ELA | R-50 | N/A | N/A | N/A | N/A | unread
    resnet50 ema | EMA | R-50 | N/A | N/A | N/A | N/A | unprinted
    resnet101 simam e_lambda=0.1 | SimAM | R-101 | 44.55M | 7.83G | 78.65 | 94.11 | authors
    mobilenet_v2 simam e_lambda=0.1 | SimAM | MobileNetV2 | 3.50M | 0.31G | 72.36 | 90.74 | authors
    mobilenet_v2 coord | Coordinate attention | MobileNetV2 | 3.95M | 0.310G | 74.3 | N/A | ofema expanded
    mobilenet_v2 ema | EMA | MobileNetV2 | 3.55M | 0.306G | 74.32 | N/A | ofema expanded
    """,
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (TABLE_1, TABLE_2, TABLE_3, POSTER, TABLE_4, TABLE_5, TABLE_6, FIGURE_4, LATER)
}  # fmt: skip
