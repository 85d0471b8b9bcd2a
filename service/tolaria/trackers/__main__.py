"""`python -m tolaria.trackers NAME`: the process of one tracker, which the service starts."""

import sys

from tolaria.trackers.process import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
