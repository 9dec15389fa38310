"""Engines: token ids in, text out. They know no HTTP."""
