"""The `elr` command: it translates options to function calls and results to text."""
