"""What `ray job submit` runs: each script parses arguments, calls one function, and exits with its code."""
