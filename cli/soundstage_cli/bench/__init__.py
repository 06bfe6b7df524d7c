"""Measurements, each against another way to do the same on the same machine."""
