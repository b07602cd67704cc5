"""Functions that run in enclaves on real input, and what builds their images."""
