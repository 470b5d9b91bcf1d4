"""Linear algebra on tensors: exact spectra, products, low-rank values. No names, no files."""
