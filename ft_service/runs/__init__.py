"""What happened: a run's folder, lease, metrics and events."""
