"""Run plans: a pure function of spec, dataset facts, model shape and resources."""
