"""The feature cache: the output of frozen stages, computed once."""

from tl_modules.cache.feature_cache import *
