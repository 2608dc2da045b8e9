"""Tasks: they define loss, metrics and predictions."""

from tl_modules.tasks.classification import *
from tl_modules.tasks.regression import *
