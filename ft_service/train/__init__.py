"""Training: one worker, a group of workers, and the attempts of a run."""
