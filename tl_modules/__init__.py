"""Transfer learning by composition: a task, a backbone, a fine-tuning strategy and methods.

Importing this package is what makes the bare class names work in a config.
"""

from tl_modules.backbones import Backbone, ConvNet, HubBackbone, ImageBackbone, TimmBackbone, TorchvisionBackbone
from tl_modules.base import DomainView, TransferModule
from tl_modules.errors import UserError
from tl_modules.finetuning import (
    FeatureExtraction,
    FineTuning,
    FreezeThenUnfreeze,
    Full,
    GradualUnfreezing,
    LastStages,
)
from tl_modules.heads import CosineHead, MLPHead
from tl_modules.methods import L2SP, Method
from tl_modules.runs import load_run
from tl_modules.tasks import Classification, Regression

__version__ = "0.1.0"
__all__ = [
    "L2SP",
    "Backbone",
    "Classification",
    "ConvNet",
    "CosineHead",
    "DomainView",
    "FeatureExtraction",
    "FineTuning",
    "FreezeThenUnfreeze",
    "Full",
    "GradualUnfreezing",
    "HubBackbone",
    "ImageBackbone",
    "LastStages",
    "MLPHead",
    "Method",
    "Regression",
    "TimmBackbone",
    "TorchvisionBackbone",
    "TransferModule",
    "UserError",
    "load_run",
]
