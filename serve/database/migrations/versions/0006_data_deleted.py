"""Whether an ended job's links to its data are gone from storage."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_JOBS = "fine_tuning_jobs"
_INDEX = "ix_fine_tuning_jobs_data_deleted"


def upgrade() -> None:
    op.add_column(_JOBS, sa.Column("data_deleted", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index(_INDEX, _JOBS, ["data_deleted"])


def downgrade() -> None:
    op.drop_index(_INDEX, _JOBS)
    with op.batch_alter_table(_JOBS) as table:
        table.drop_column("data_deleted")
