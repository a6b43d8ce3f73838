"""Other people's networks for the sweep of attach, each with random weights and an input that it takes.

Nothing is downloaded: configurations are small, and libraries that are missing are noticed when a network is built.

inputs            the smallest image that a network takes
torchvision_zoo   torchvision's classifiers, detectors, segmentation, video, optical flow and quantizable networks
timm_zoo          timm's classifiers and feature extractors
hugging_face      transformers' image, detection, segmentation and audio networks
diffusion         diffusers' U-Nets and autoencoders
yolo              Ultralytics' detectors, and their segmentation, pose and classification networks
segmentation      segmentation_models_pytorch
medical           MONAI's networks, most of them in three dimensions
spikes            spikingjelly's and snntorch's spiking networks
written           networks as tutorials and papers write them, written anew here
unusual           networks that run modules several times or on complex numbers, written anew here
signals           networks for signals of one dimension, written anew here
"""

from sweep_networks import (
    diffusion,
    hugging_face,
    medical,
    segmentation,
    signals,
    spikes,
    timm_zoo,
    torchvision_zoo,
    unusual,
    written,
    yolo,
)
from sweep_networks.inputs import Builder

LIBRARIES: dict[str, dict[str, Builder]] = {
    "torchvision": torchvision_zoo.NETWORKS,
    "timm": timm_zoo.NETWORKS,
    "transformers": hugging_face.NETWORKS,
    "diffusers": diffusion.NETWORKS,
    "ultralytics": yolo.NETWORKS,
    "segmentation_models_pytorch": segmentation.NETWORKS,
    "monai": medical.NETWORKS,
    "spikingjelly": spikes.SPIKINGJELLY,
    "snntorch": spikes.SNNTORCH,
    "written": {**written.NETWORKS, **unusual.NETWORKS, **signals.NETWORKS},
}
"""The networks of each package, by their names; "written" needs no package."""

EVALUATED_ONLY = torchvision_zoo.EVALUATED_ONLY
"""Networks whose training needs more than images."""
