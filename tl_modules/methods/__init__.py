"""Methods: terms added to the task's loss."""

from tl_modules.methods.adversarial import *
from tl_modules.methods.augmentation import *
from tl_modules.methods.base import *
from tl_modules.methods.discrepancy import *
from tl_modules.methods.distillation import *
from tl_modules.methods.entropy import *
from tl_modules.methods.generalization import *
from tl_modules.methods.normalization import *
from tl_modules.methods.regularization import *
from tl_modules.methods.schedules import *
from tl_modules.methods.self_training import *
