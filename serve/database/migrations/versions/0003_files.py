"""Organisations of keys; uploaded files, their contents, and uploads in parts."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

Moment = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("organization", sa.Text))
    op.create_table(
        "file_contents",
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_file_contents"),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("organization", sa.Text),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created", Moment, nullable=False),
        sa.Column("expires", Moment),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("status_details", sa.Text),
        sa.Column("validation", sa.JSON),
        sa.Column("checked_since", Moment),
        sa.Column("job", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        sa.ForeignKeyConstraint(["digest"], ["file_contents.digest"], name="fk_files_digest_file_contents"),
        sa.UniqueConstraint("job", name="uq_files_job"),
    )
    for column in ("key", "organization", "digest", "expires", "status"):
        op.create_index(f"ix_files_{column}", "files", [column])
    op.create_table(
        "uploads",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("organization", sa.Text),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created", Moment, nullable=False),
        sa.Column("expires", Moment, nullable=False),
        sa.Column("file_seconds", sa.Integer),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("completed_with", sa.Text),
        sa.Column("file", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_uploads"),
    )
    for column in ("key", "expires"):
        op.create_index(f"ix_uploads_{column}", "uploads", [column])
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("upload", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("created", Moment, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_upload_parts"),
        sa.ForeignKeyConstraint(["upload"], ["uploads.id"], name="fk_upload_parts_upload_uploads"),
    )
    op.create_index("ix_upload_parts_upload", "upload_parts", ["upload"])


def downgrade() -> None:
    for table in ("upload_parts", "uploads", "files", "file_contents"):
        op.drop_table(table)
    with op.batch_alter_table("api_keys") as keys:
        keys.drop_column("organization")
