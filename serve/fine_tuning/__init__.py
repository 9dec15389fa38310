"""OpenAI's fine-tuning API: files, uploads and jobs, and the controller that makes runs of the jobs."""
