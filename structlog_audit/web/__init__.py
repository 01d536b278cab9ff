"""Interceptors of requests, one module for each kind of application."""

from structlog_audit.web._client import ClientAddress

__all__ = ["ClientAddress"]
