"""Runs: the directory and what its config may name; writing, resuming, interrupting and displaying a run."""

from tl_modules.runs.directory import *
from tl_modules.runs.interruptions import *
from tl_modules.runs.metrics import *
from tl_modules.runs.progress import *
from tl_modules.runs.resume import *
