"""Published adapters and models, with their records and model cards."""
