"""The version of this library, written into the first line of every session."""

__version__ = "0.1.0"
FORMAT = 1
"""Version of the line format; it rises when a reader would have to change."""
