"""Server mathematics, pure: tensors in, tensors out."""
