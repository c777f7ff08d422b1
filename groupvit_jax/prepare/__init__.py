"""Data sets in their official layouts, made into ArrayRecord files that any host can read, local or in a bucket."""
