"""Checks and measurements of the ops, against torch and against other libraries."""
