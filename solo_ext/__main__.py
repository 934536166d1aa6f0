"""`python -m solo_ext`: the same as `solo-ext`."""

from solo_ext.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
