"""What a trained model is worth: metrics, predictions, pictures, the choice of a model, its cost; what a pretrained one promises."""

from tl_modules.evaluation.cost import *
from tl_modules.evaluation.figures import *
from tl_modules.evaluation.model_selection import *
from tl_modules.evaluation.predictions import *
from tl_modules.evaluation.test_time import *
from tl_modules.evaluation.transferability import *
