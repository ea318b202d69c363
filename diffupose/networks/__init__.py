"""The denoisers, and the layers that they are made of."""
