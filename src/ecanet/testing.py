"""One error budget: a result may be as far from a float64 oracle as its own rounding explains."""
