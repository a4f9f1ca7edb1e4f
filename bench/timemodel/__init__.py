"""Modelled kernel times from SASS: one multiprocessor, simulated event by event. A developer's tool; see
bench/README.md.
"""
