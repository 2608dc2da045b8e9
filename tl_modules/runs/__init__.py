"""A run: its directory and what that may name; what writes, resumes, interrupts and shows it."""

from tl_modules.runs.directory import *
from tl_modules.runs.interruptions import *
from tl_modules.runs.metrics import *
from tl_modules.runs.progress import *
from tl_modules.runs.resume import *
