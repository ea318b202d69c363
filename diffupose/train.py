"""``torchrun --nproc-per-node=N -m diffupose.train``: ``diffupose train`` in several processes."""

import sys

from diffupose.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
