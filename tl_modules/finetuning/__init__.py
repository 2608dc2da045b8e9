"""Fine-tuning strategies: which stages train in which epoch, and how fast."""

from tl_modules.finetuning.base import FineTuning
from tl_modules.finetuning.freezing import FeatureExtraction, FreezeThenUnfreeze, Full, GradualUnfreezing, LastStages
from tl_modules.finetuning.optimizer import WarmupCosine

__all__ = [
    "FeatureExtraction",
    "FineTuning",
    "FreezeThenUnfreeze",
    "Full",
    "GradualUnfreezing",
    "LastStages",
    "WarmupCosine",
]
