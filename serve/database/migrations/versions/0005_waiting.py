"""What a fine-tuning job waits for."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_JOBS = "fine_tuning_jobs"


def upgrade() -> None:
    op.add_column(_JOBS, sa.Column("waiting", sa.JSON))


def downgrade() -> None:
    with op.batch_alter_table(_JOBS) as table:
        table.drop_column("waiting")
