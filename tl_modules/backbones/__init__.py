"""Backbones: raw input -> features."""

from tl_modules.backbones.base import Backbone
from tl_modules.backbones.vision import ConvNet, HubBackbone, ImageBackbone, TimmBackbone, TorchvisionBackbone

__all__ = ["Backbone", "ConvNet", "HubBackbone", "ImageBackbone", "TimmBackbone", "TorchvisionBackbone"]
