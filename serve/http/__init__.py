"""What all HTTP APIs share: keys, error bodies, limits."""
