"""`python -m raymeta`: the same as the console script."""

from raymeta.cli import main

main()
