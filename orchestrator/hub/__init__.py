"""Models on the Hugging Face Hub: fetched by name, and where a folder comes from."""
