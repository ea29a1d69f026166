"""`python -m kvembed`."""

from .cli import main

main()
