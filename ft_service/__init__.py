"""Distributed fine-tuning of the Llama 3 family on Ray: one run spec becomes an adapter that answers over HTTP."""
