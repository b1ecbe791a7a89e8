"""Downstream heads, in the same form as objectives: options, what they need of the model, loss."""
