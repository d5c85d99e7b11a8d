"""The operations as a repository for Hugging Face's ``kernels``: ``python -m ditfast.integrations.hub OUT``."""
