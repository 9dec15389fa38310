"""Fine-tuning jobs: their events, checkpoints, webhooks, and the lease of the controller."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

Moment = sa.DateTime(timezone=True)
_JOBS = "fine_tuning_jobs"


def upgrade() -> None:
    op.create_table(
        _JOBS,
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("created", Moment, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("organization", sa.Text),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("training_file", sa.Text, nullable=False),
        sa.Column("validation_file", sa.Text),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("since", Moment, nullable=False),
        sa.Column("wish", sa.Text),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("status_before", sa.Text),
        sa.Column("resolved", sa.JSON),
        sa.Column("estimated_finish", Moment),
        sa.Column("finished", Moment),
        sa.Column("adapter", sa.Text),
        sa.Column("trained_tokens", sa.BigInteger),
        sa.Column("error", sa.JSON),
        sa.Column("result_files", sa.JSON, nullable=False),
        sa.Column("last_step", sa.Integer, nullable=False),
        sa.Column("trouble", sa.Text),
        sa.PrimaryKeyConstraint("id", name=f"pk_{_JOBS}"),
        sa.UniqueConstraint("run_id", name=f"uq_{_JOBS}_run_id"),
        sa.UniqueConstraint("alias", name=f"uq_{_JOBS}_alias"),
    )
    for column in ("created", "key", "organization", "training_file", "state", "adapter"):
        op.create_index(f"ix_{_JOBS}_{column}", _JOBS, [column])
    op.create_table(
        "fine_tuning_creates",
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("job", sa.Text, nullable=False),
        sa.Column("time", Moment, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_fine_tuning_creates"),
    )
    op.create_table(
        "fine_tuning_events",
        sa.Column("number", sa.Integer, nullable=False, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("job", sa.Text, nullable=False),
        sa.Column("time", Moment, nullable=False),
        sa.Column("level", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("data", sa.JSON),
        sa.PrimaryKeyConstraint("number", name="pk_fine_tuning_events"),
        sa.UniqueConstraint("id", name="uq_fine_tuning_events_id"),
        _of_job("fine_tuning_events"),
    )
    op.create_table(
        "fine_tuning_checkpoints",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("job", sa.Text, nullable=False),
        sa.Column("time", Moment, nullable=False),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_fine_tuning_checkpoints"),
        sa.UniqueConstraint("alias", name="uq_fine_tuning_checkpoints_alias"),
        _of_job("fine_tuning_checkpoints"),
    )
    op.create_index("ix_fine_tuning_checkpoints_adapter", "fine_tuning_checkpoints", ["adapter"])
    op.create_table(
        "fine_tuning_webhooks",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("job", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("payload", sa.Text, nullable=False),
        sa.Column("time", Moment, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_attempt", Moment),
        sa.Column("outcome", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_fine_tuning_webhooks"),
        _of_job("fine_tuning_webhooks"),
    )
    op.create_index("ix_fine_tuning_webhooks_next_attempt", "fine_tuning_webhooks", ["next_attempt"])
    for table in ("fine_tuning_events", "fine_tuning_checkpoints", "fine_tuning_webhooks"):
        op.create_index(f"ix_{table}_job", table, ["job"])
    op.create_table(
        "leases",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("expires", Moment, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )


def _of_job(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["job"], [f"{_JOBS}.id"], name=f"fk_{table}_job_{_JOBS}")


def downgrade() -> None:
    for table in (
        "leases",
        "fine_tuning_webhooks",
        "fine_tuning_checkpoints",
        "fine_tuning_events",
        "fine_tuning_creates",
        _JOBS,
    ):
        op.drop_table(table)
