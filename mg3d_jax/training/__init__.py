"""State, optimizer, step, loop, checkpoints and what a run tells about itself."""
