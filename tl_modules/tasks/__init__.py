"""Tasks: what the loss, the metrics and a prediction are."""

from tl_modules.tasks.classification import *
from tl_modules.tasks.regression import *
