"""The ops in plain PyTorch: the specification that every other backend is tested against."""
