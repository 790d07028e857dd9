"""Upkeep: what has ended or expired is removed, and what a channel keeps is bounded.

Revision ID: pgchan_0002
Revises: pgchan_0001
"""

from __future__ import annotations

from pathlib import Path

from alembic import op

from pgchan.migrations import statements

revision = "pgchan_0002"
down_revision = "pgchan_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    statements.run(op, Path(__file__).with_suffix(".sql"))


def downgrade() -> None:
    statements.run(op, Path(__file__).with_suffix(".down.sql"))
