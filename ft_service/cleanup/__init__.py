"""Deleting what nothing needs any more: runs, adapters, models and datasets on storage."""
