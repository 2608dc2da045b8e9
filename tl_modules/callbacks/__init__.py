"""What watches a run: its directory, the feature cache, progress, pictures, ...; and what adapts it in a test."""

from tl_modules.callbacks.exact_resume import ExactResume
from tl_modules.callbacks.feature_cache import FeatureCache
from tl_modules.callbacks.freeze_audit import FreezeAudit
from tl_modules.callbacks.interruptions import Interruptions
from tl_modules.callbacks.pictures import Pictures
from tl_modules.callbacks.predictions import PredictionTable
from tl_modules.callbacks.progress import Bar, PlainProgress
from tl_modules.callbacks.run_directory import RunDirectory
from tl_modules.callbacks.selection import Selection
from tl_modules.callbacks.test_time import T3A, TENT, AdaBN, TestTimeAdaptation

__all__ = [
    "T3A",
    "TENT",
    "AdaBN",
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
    "TestTimeAdaptation",
]
