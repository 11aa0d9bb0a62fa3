"""Several objectives: their values, and the front of trials that no other beats in all of them."""
