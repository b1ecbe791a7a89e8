"""Volumes and reports on disk -> checked, sharded records."""
