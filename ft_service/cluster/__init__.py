"""The Ray cluster: joining it, submitting to it, and stopping on purpose."""
