"""Channels, messages, runs and workers, with the routines that write them.

Revision ID: pgchan_0001
Revises: nothing
"""

from __future__ import annotations

from pathlib import Path

from alembic import op

from pgchan.migrations import statements

revision = "pgchan_0001"
down_revision = None
branch_labels = ("pgchan",)
depends_on = None


def upgrade() -> None:
    statements.run(op, Path(__file__).with_suffix(".sql"))


def downgrade() -> None:
    statements.run(op, Path(__file__).with_suffix(".down.sql"))
