"""Tasks: what the loss, the metrics and a prediction are."""

from tl_modules.tasks.classification import Classification
from tl_modules.tasks.regression import Regression

__all__ = ["Classification", "Regression"]
