"""`python -m dyvte_engine` is `dyvte-engine`."""

from .commands.main import main

main()
