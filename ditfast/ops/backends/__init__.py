"""Backend choice: which ones can run, which was requested, which is correct here, which is fastest."""
