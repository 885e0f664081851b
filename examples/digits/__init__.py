"""Small convolutional networks on scikit-learn's handwritten digits, in plain NumPy with the norms of normfast."""
