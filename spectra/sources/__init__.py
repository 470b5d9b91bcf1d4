"""Models and data that people have: Hugging Face folders, adapters, tables, image folders, factories."""
