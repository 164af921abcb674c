"""Lets ``python -m simulator.cli`` stand for ``myriad``."""

from simulator.cli import main

main()
