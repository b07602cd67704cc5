"""Nearest city: a SQLite database of the world's cities and the function that searches it in an enclave.

``handler.py`` runs inside; ``build.py`` makes the database and the image, outside.
"""
