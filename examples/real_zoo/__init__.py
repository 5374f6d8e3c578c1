"""Real pretrained models and their fine-tunes, rebuilt from published packages and merged through the command line.

python -m examples.real_zoo.run            builds everything, merges, prints the tables (about half an hour on 2 cores)
python -m examples.real_zoo.run --quick    a reduced form (a few minutes)
"""
