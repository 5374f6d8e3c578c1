"""Learning numbers (coefficients, masks) with a model and data; merging only applies them."""
