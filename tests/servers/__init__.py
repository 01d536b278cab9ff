"""Servers that stand at the other end of the remote sinks: honest, scripted, and in between."""
