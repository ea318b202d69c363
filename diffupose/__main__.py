"""``python -m diffupose``: the ``diffupose`` command."""

import sys

from diffupose.cli import main

if __name__ == "__main__":
    sys.exit(main())
