"""The Ray Serve application: OpenAI-shaped HTTP in front of one base model and every adapter published for it."""
