"""Features of a model: their moments, streamed, and how fine-tuning shifted them."""
