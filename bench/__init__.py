"""Benchmarks: CPU times beside peers, work counters in the simulator, kernel resources, modelled GPU times. See
README.md.
"""
