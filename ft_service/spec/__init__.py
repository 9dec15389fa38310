"""What was asked: the run spec, its rules, and how it is loaded."""
