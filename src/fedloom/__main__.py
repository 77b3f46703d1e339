"""``python -m fedloom`` is the ``fedloom`` command."""

from fedloom.commands.main import main

main()
