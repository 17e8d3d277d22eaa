"""``python -m hotset`` is the ``hotset`` command."""

from hotset.cli.main import main

main()
