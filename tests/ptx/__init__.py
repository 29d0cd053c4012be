"""Executes the PTX that nvcc and Triton make of the kernels, without a GPU: what the tests of compiled code run on.

``program`` reads PTX, ``instructions`` (with ``matrices`` and ``asynchronous``) turn it into numpy, ``machine`` runs a grid of
it over ``memory``. Each instruction is done for all threads of a block at once.

It is strict where hardware is lenient. Memory a kernel was not given, misaligned addresses and warps that diverge at a
collective are errors; asynchronous copies land as late as they may and leave NaN behind until then. It knows nothing of time.
"""
