"""What watches a run: its directory, the feature cache, the freeze audit, interruptions, progress, pictures."""

from tl_modules.callbacks.exact_resume import ExactResume
from tl_modules.callbacks.feature_cache import FeatureCache
from tl_modules.callbacks.freeze_audit import FreezeAudit
from tl_modules.callbacks.interruptions import Interruptions
from tl_modules.callbacks.pictures import Pictures
from tl_modules.callbacks.predictions import PredictionTable
from tl_modules.callbacks.progress import Bar, PlainProgress
from tl_modules.callbacks.run_directory import RunDirectory
from tl_modules.callbacks.selection import Selection

__all__ = [
    "Bar",
    "ExactResume",
    "FeatureCache",
    "FreezeAudit",
    "Interruptions",
    "Pictures",
    "PlainProgress",
    "PredictionTable",
    "RunDirectory",
    "Selection",
]
