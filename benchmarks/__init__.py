"""Benchmarks: what an audit call costs beside the bare system calls it cannot do without."""
