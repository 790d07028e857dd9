"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

from __future__ import annotations

from pathlib import Path

from alembic import op

from pgchan.migrations import statements

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    statements.run(op, Path(__file__).with_suffix(".sql"))


def downgrade() -> None:
    statements.run(op, Path(__file__).with_suffix(".down.sql"))
