"""Facts: the Llama 3 family, licenses, and GPU types. Needs neither torch nor a network."""
