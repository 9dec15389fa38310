"""Llama 3's chat format: conversations to token ids and loss masks."""
