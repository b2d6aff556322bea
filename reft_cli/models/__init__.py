"""Everything that knows Hugging Face modules: loading, finding blocks, hooks."""
