"""Readers of the files in which the research community keeps its pose data sets; no data is shipped."""
