"""`python -m stillhouse` is the command line."""

from stillhouse.cli.main import main

main()
