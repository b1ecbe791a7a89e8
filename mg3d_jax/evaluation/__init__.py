"""What a trained run can do, with the protocol of every number named."""
