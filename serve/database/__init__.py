"""The service's one database: keys and the audit log; votes and jobs join it. SQLite on a local disk, or Postgres."""
