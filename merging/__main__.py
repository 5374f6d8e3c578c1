"""`python -m merging`: the command line without the console script."""

from merging.commands import run

if __name__ == "__main__":
    run()
