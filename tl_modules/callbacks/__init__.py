"""What watches a run: its directory, the table of stages, the progress lines, TensorBoard's pictures."""

from tl_modules.callbacks.pictures import Pictures
from tl_modules.callbacks.predictions import PredictionTable
from tl_modules.callbacks.progress import Bar, PlainProgress
from tl_modules.callbacks.run_directory import RunDirectory
from tl_modules.callbacks.stage_table import StageTable

__all__ = ["Bar", "Pictures", "PlainProgress", "PredictionTable", "RunDirectory", "StageTable"]
