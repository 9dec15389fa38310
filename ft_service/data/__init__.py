"""Data: from files to packed rows on storage, checked on the way."""
