"""Statistics of evaluations: arrays in, frozen dataclasses out. Imports no other part of the project but its errors."""
