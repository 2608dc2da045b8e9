"""What frozen stages give, computed once."""

from tl_modules.cache.feature_cache import *
