"""Jobs made of what other libraries train: models of transformers, and modules of Lightning."""
