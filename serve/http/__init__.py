"""Shared by all HTTP APIs: keys, error bodies, limits."""
