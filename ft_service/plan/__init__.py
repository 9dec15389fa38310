"""What was decided: a run plan, as a pure function of spec, data facts, model shape and resources."""
