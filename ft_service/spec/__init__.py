"""The run spec: its schema, its rules, and its loading."""
