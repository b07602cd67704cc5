"""Bytes in shared memory: the EPC arena, its EPCM, the SMC and the launch table.

The lowest of the three floors. Nothing here knows processes, images or policies, and nothing here imports
from :mod:`enturbo.workers` or :mod:`enturbo.runtime`. The modules that the enclave side needs
(:mod:`~enturbo.shm.layout`, :mod:`~enturbo.shm.errors`) import the standard library alone.
"""
