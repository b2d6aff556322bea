"""Several processes of one run: which one this is, how they agree, and how a parent starts and ends them."""
