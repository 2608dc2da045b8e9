"""Methods: terms that are added to the task's loss."""

from tl_modules.methods.base import Method
from tl_modules.methods.regularization import L2SP

__all__ = ["L2SP", "Method"]
