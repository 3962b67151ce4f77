"""Pallas kernels, one file per op and backend. Imports nothing of memzoo; empty until the first kernel lands."""
