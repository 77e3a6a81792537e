"""The folder of main.py, in which everything that ships with the program is found."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
