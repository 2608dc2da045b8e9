"""Fine-tuning strategies: which stages train when, and how fast."""

from tl_modules.finetuning.base import *
from tl_modules.finetuning.freezing import *
from tl_modules.finetuning.lora import *
from tl_modules.finetuning.optimizer import *
from tl_modules.finetuning.sam import *
