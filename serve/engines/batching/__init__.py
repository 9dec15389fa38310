"""Continuous batching on stock transformers modules: cache, scheduler, forward pass, adapters, sampling."""
