"""Taking published adapters and models along: as a folder, to the Hugging Face hub, as GGUF."""
