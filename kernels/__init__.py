"""Triton device code: what runs on the GPU, and nothing else. Imports only triton."""
