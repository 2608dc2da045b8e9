"""Backbones: raw input -> features."""

from tl_modules.backbones.base import *
from tl_modules.backbones.convnet import *
from tl_modules.backbones.multi_input import *
from tl_modules.backbones.tabular import *
from tl_modules.backbones.vision import *
