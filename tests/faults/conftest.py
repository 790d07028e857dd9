"""What faults are injected into."""

from __future__ import annotations

import pytest


@pytest.fixture
def dsn(direct_dsn: str) -> str:
    """Faults are put between pgchan and the server; a pooler there would have its own answer to them."""
    return direct_dsn
