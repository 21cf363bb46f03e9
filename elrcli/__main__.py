"""`python -m elrcli` equals `elr`."""

from elrcli.cli.app import main

if __name__ == "__main__":
    main()
