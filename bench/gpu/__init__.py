"""What bench_gpu.py measures on a GPU, and gpu.sh sanitizes there.

All contestants run in one process, in turns. Every function that touches CUDA itself is in `timer`, so that
the tests put a CPU's in their place and run all the rest.
"""
