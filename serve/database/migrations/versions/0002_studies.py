"""Studies in which people vote: questions, comparisons, raters, assignments and votes."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

Moment = sa.DateTime(timezone=True)


def _of(table: str, column: str, other: str) -> sa.ForeignKeyConstraint:
    other_table = other.partition(".")[0]
    return sa.ForeignKeyConstraint([column], [other], name=f"fk_{table}_{column}_{other_table}")


def upgrade() -> None:
    op.create_table(
        "secrets",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("value", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_secrets"),
    )
    op.create_table(
        "studies",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("created", Moment, nullable=False),
        sa.Column("closed", Moment),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("models", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_studies"),
    )
    op.create_table(
        "study_questions",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("study", sa.Text, nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("turns", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_study_questions"),
        _of("study_questions", "study", "studies.name"),
    )
    op.create_table(
        "study_comparisons",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("study", sa.Text, nullable=False),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("first_model", sa.Text),
        sa.Column("second_model", sa.Text),
        sa.Column("first_answer", sa.Text, nullable=False),
        sa.Column("second_answer", sa.Text, nullable=False),
        sa.Column("first_is_cut", sa.Boolean, nullable=False),
        sa.Column("second_is_cut", sa.Boolean, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_study_comparisons"),
        _of("study_comparisons", "study", "studies.name"),
        _of("study_comparisons", "question", "study_questions.id"),
    )
    op.create_table(
        "study_raters",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("study", sa.Text, nullable=False),
        sa.Column("name", sa.Text),
        sa.Column("token_digest", sa.Text),
        sa.Column("deleted", Moment),
        sa.PrimaryKeyConstraint("id", name="pk_study_raters"),
        _of("study_raters", "study", "studies.name"),
    )
    op.create_table(
        "study_assignments",
        sa.Column("id", sa.Text, nullable=False),
        sa.Column("study", sa.Text, nullable=False),
        sa.Column("rater", sa.Text, nullable=False),
        sa.Column("comparison", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("first_is_left", sa.Boolean, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("revealed", Moment),
        sa.Column("void", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_study_assignments"),
        _of("study_assignments", "study", "studies.name"),
        _of("study_assignments", "rater", "study_raters.id"),
        _of("study_assignments", "comparison", "study_comparisons.id"),
    )
    op.create_table(
        "study_votes",
        sa.Column("assignment", sa.Text, nullable=False),
        sa.Column("study", sa.Text, nullable=False),
        sa.Column("rater", sa.Text, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("scores", sa.JSON, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("seconds", sa.Double),
        sa.Column("time", Moment, nullable=False),
        sa.PrimaryKeyConstraint("assignment", name="pk_study_votes"),
        _of("study_votes", "assignment", "study_assignments.id"),
        _of("study_votes", "study", "studies.name"),
        _of("study_votes", "rater", "study_raters.id"),
    )
    for table in ("study_questions", "study_comparisons", "study_raters", "study_assignments", "study_votes"):
        op.create_index(f"ix_{table}_study", table, ["study"])
    for table in ("study_assignments", "study_votes"):
        op.create_index(f"ix_{table}_rater", table, ["rater"])


def downgrade() -> None:
    for table in (
        "study_votes",
        "study_assignments",
        "study_raters",
        "study_comparisons",
        "study_questions",
        "studies",
        "secrets",
    ):
        op.drop_table(table)
