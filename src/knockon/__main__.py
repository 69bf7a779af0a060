"""``python -m knockon`` is the command ``knockon``."""

from knockon.cli import main

main()
