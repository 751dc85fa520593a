"""The wing of benchmark tables: one file a benchmark, each with its commands. Nothing imports them."""
