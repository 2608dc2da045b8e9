"""Pretraining: backbones learn from data without labels, for the next run's `--model.backbone.weights RUN`."""

from tl_modules.pretraining.base import *
from tl_modules.pretraining.contrastive import *
from tl_modules.pretraining.generative import *
from tl_modules.pretraining.image_text import *
from tl_modules.pretraining.reconstruction import *
