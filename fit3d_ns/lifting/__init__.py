"""The closed-form lift: features solved, not trained, onto any Gaussians that already exist."""
