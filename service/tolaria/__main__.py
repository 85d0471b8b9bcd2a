"""`python -m tolaria` is the `tolaria` command. Owns nothing."""

from tolaria.cli.app import main

if __name__ == "__main__":
    main()
