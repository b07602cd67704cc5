"""Who measures: records, hashers, the measuring step, the worker process and the pool.

The middle floor. It knows pages, digests and launches, never images, signatures or policies.
"""
