"""`python -m trmt` is `trmt`."""

from trmt.cli import main

if __name__ == "__main__":
    main()
