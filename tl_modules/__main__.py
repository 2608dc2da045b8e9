"""`python -m tl_modules` is `tl`."""

from tl_modules.cli.main import main

main()
