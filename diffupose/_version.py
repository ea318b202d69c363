"""The version, which files and messages name."""

__version__ = "0.1.0"
