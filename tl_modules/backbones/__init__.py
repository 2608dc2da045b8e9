"""Backbones: raw input -> features."""

from tl_modules.backbones.audio import *
from tl_modules.backbones.audio_frontend import *
from tl_modules.backbones.audio_transformer import *
from tl_modules.backbones.base import *
from tl_modules.backbones.convnet import *
from tl_modules.backbones.ft_transformer import *
from tl_modules.backbones.multi_input import *
from tl_modules.backbones.recurrent import *
from tl_modules.backbones.tabular import *
from tl_modules.backbones.tabular_resnet import *
from tl_modules.backbones.text import *
from tl_modules.backbones.transformer import *
from tl_modules.backbones.vision import *
