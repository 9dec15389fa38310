"""The `ft` command."""
