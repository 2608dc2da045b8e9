"""Backbones: raw input -> features."""

from tl_modules.backbones.base import Backbone
from tl_modules.backbones.small import ConvNet, LeNet
from tl_modules.backbones.tabular import VectorBackbone
from tl_modules.backbones.vision import HubBackbone, ImageBackbone, TimmBackbone, TorchvisionBackbone

__all__ = [
    "Backbone",
    "ConvNet",
    "HubBackbone",
    "ImageBackbone",
    "LeNet",
    "TimmBackbone",
    "TorchvisionBackbone",
    "VectorBackbone",
]
