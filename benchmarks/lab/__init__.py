"""The laboratory behind `benchmarks/quality.py`: small models trained every way that a person might choose instead."""
