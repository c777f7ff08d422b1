"""Conversion of data sets in official layouts to ArrayRecord files."""
