"""Transfer learning by composition: a task, a backbone, a fine-tuning strategy and methods.

Importing this package registers its classes, so that a config can use their bare names.
"""

from typing import TYPE_CHECKING

from tl_modules.backbones import *
from tl_modules.batch.output import DomainOutput as DomainOutput
from tl_modules.batch.samples import Batch as Batch
from tl_modules.batch.samples import Padded as Padded
from tl_modules.errors import UserError as UserError
from tl_modules.evaluation.ensembles import DeepEnsemble as DeepEnsemble
from tl_modules.evaluation.ensembles import MCDropout as MCDropout
from tl_modules.evaluation.test_time import T3A as T3A
from tl_modules.evaluation.test_time import TENT as TENT
from tl_modules.evaluation.test_time import AdaBN as AdaBN
from tl_modules.finetuning import *
from tl_modules.heads import *
from tl_modules.methods import *
from tl_modules.module import TransferModule as TransferModule
from tl_modules.pretraining import *
from tl_modules.runs import load_run as load_run
from tl_modules.tasks import *

__version__ = "0.1.0"
if not TYPE_CHECKING:  # mypy follows the star imports
    __all__ = sorted(name for name, value in globals().items() if getattr(value, "__module__", "").startswith(__name__))
