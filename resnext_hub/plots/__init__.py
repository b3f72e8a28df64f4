"""Plots of a run: one file per plot."""
