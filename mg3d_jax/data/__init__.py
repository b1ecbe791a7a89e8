"""Files on disk -> batches on devices."""
