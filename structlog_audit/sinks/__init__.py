"""Sinks: places where lines become durable."""
