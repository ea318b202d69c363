"""Data sets: motion capture through virtual cameras, and the community's Human3.6M files."""
