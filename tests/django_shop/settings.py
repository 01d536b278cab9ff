"""A small shop; its database is where SHOP_DATABASE says."""

from __future__ import annotations

import os

import structlog

import structlog_audit
from structlog_audit.web.django import Exclude

SECRET_KEY = "not-secret"
ALLOWED_HOSTS = ["*"]
USE_TZ = True
ROOT_URLCONF = "django_shop.urls"
LOGGING_CONFIG = None
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django_shop",
    "structlog_audit.web.django",
]
MIDDLEWARE = [
    "structlog_audit.web.django.AuditMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django_shop.views.Gate",
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["SHOP_DATABASE"],
        "ATOMIC_REQUESTS": True,
        "OPTIONS": {"timeout": 60},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
STRUCTLOG_AUDIT = {
    "EXCLUDE": [Exclude(kind="public_read", route="shop:about", reason="public page")],
    "PRIVILEGED": lambda request: False,
}
if "AUDIT_LOG_DIR" in os.environ:  # a server; tests in this process capture their entries
    structlog.configure(processors=structlog_audit.audit_processors(app="shop"))
