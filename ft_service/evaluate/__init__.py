"""Judging what was trained: sample answers and the verification of an adapter."""
