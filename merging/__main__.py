"""`python -m merging`: the command line without the console script."""

from merging.commands import main

if __name__ == "__main__":
    main()
