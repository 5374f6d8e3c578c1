"""Launcher for a checkout: `python cli.py merge recipe.yaml out`. Installed, the command is `taskvec`."""

from merging.commands import main

if __name__ == "__main__":
    main()
