"""What the commands beside this folder run: one package for each of them, and what these share."""
