"""Pure Linen modules: volume encoder, report encoder, cross-modal fusion and heads. No I/O, no loss."""
