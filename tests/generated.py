"""How hard generated tests try: so many examples in a normal run, a hundred times as many in a soak.

    HYPOTHESIS_PROFILE=soak pytest tests/test_channel_model.py        or: pytest --hypothesis-profile=soak …

A normal run tries the same examples each time, so that it fails for nobody but who broke something. A soak draws new
ones, keeps those that failed in .hypothesis and tries them first, and has no timeout.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

NORMAL, SOAK = 100, 10_000  # examples of a test that does not say

settings.register_profile("soak", max_examples=SOAK, deadline=None, print_blob=True)
if profile := os.environ.get("HYPOTHESIS_PROFILE"):
    settings.load_profile(profile)


def effort(examples: int = NORMAL, **options: Any) -> settings:
    """The settings of a test that tries so many examples in a normal run."""
    is_soak = settings.default is not None and settings.default.max_examples > NORMAL
    kept: dict[str, Any] = {} if is_soak else {"database": None, "derandomize": True}
    return settings(
        max_examples=examples * SOAK // NORMAL if is_soak else examples, deadline=None,
        suppress_health_check=list(HealthCheck), **kept, **options,
    )  # fmt: skip


def patience(seconds: float) -> pytest.MarkDecorator:
    """The timeout of such a test: a failure is made smaller before it is shown; a soak takes as long as it takes."""
    is_soak = settings.default is not None and settings.default.max_examples > NORMAL
    return pytest.mark.timeout(0 if is_soak else seconds)
