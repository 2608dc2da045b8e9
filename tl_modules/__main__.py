"""`python -m tl_modules` is `tl`."""

from tl_modules.cli import main

main()
