"""Everything that knows Hugging Face's module and file names."""
