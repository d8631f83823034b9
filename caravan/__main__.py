"""`python -m caravan` is `caravan`."""

from caravan.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
