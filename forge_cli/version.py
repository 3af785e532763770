"""Forge's version, readable without the metadata of installed packages (which takes a tenth of a second)."""

__version__ = "0.1.0"
