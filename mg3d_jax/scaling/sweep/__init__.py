"""Sweeps over model and data size: declared, planned, run, compared."""
