"""``python -m qkern`` is ``qkern``."""

from qkern.cli import main

main()
