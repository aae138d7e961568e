"""``python -m lorap`` is the ``lorap`` command."""

from lorap.cli import main

main()
