"""Evaluation: metrics, predictions, figures, model selection, cost, transferability scores."""

from tl_modules.evaluation.calibration import *
from tl_modules.evaluation.cost import *
from tl_modules.evaluation.ensembles import *
from tl_modules.evaluation.figures import *
from tl_modules.evaluation.model_selection import *
from tl_modules.evaluation.predictions import *
from tl_modules.evaluation.test_time import *
from tl_modules.evaluation.transferability import *
