"""What a person sees of a comparison: tables, sentences, pictures and a page, each made from a `Comparison` alone."""
