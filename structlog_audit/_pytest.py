"""The pytest plug-in: one fixture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def audit_entries() -> Iterator[list[dict[str, Any]]]:
    """The audit entries that the test made, as they stand on their lines; nothing is recorded."""
    from structlog_audit.testing import capture_audit  # only tests that use it pay for the import

    with capture_audit() as entries:
        yield entries
