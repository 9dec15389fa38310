"""What was produced: published adapters and models, with their records and cards."""
