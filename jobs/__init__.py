"""What `ray job submit` runs: parse arguments, call one function, exit with its code."""
