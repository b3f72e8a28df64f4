"""A report of a finished run: all its plots, and a page that shows them."""
