"""What the tests and benchmarks share: the tolerance rule and the simulator."""
