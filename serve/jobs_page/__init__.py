"""The page of fine-tuning jobs."""
