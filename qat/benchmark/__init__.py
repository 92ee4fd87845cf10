"""Benchmarks that put our recipes beside other libraries on the same network, data and epochs."""
