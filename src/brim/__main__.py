"""`python -m brim` is `brim`."""

from brim.cli.main import main

if __name__ == "__main__":
    main()
