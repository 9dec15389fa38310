"""Fine-tuning jobs of OpenAI: from a person's export to jobs on a server of this project."""
