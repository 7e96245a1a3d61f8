"""The host side of each kernel file: allocation, strides, grids. Knows tensors, not derivatives."""
