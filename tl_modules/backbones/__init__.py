"""Backbones: raw input -> features."""

from tl_modules.backbones.base import *
from tl_modules.backbones.convnet import *
from tl_modules.backbones.ft_transformer import *
from tl_modules.backbones.tabular import *
from tl_modules.backbones.tabular_resnet import *
from tl_modules.backbones.vision import *
