"""The service's one database: keys, the audit log, studies and votes. SQLite on a local disk, or Postgres."""
