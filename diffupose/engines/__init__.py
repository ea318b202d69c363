"""What runs a network through the whole reverse process: one contract, several engines."""
