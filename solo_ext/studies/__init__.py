"""A table or figure of a paper as a grid of runs: what to run, running what is missing, and ours beside the paper's."""
