"""`python -m tolaria.lane` is the process of a lane; the service starts it."""

import sys

from tolaria.lane.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
