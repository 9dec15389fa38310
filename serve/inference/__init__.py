"""The inference API: OpenAI's wire shapes in front of an engine."""
