"""Metric learning: losses that shape distances, and the systems that are built on them."""
