"""`python -m tolaria` is the `tolaria` command."""

from tolaria.cli.main import main

if __name__ == "__main__":
    main()
