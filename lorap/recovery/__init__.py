"""Tuning after compression."""
