"""Facts about the Llama 3 family, its licenses, and GPU types."""
